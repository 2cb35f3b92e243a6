"""Questions with exact answers, asked while text is generated: what likelihood does not show of a run-time policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.data.decoding import forward
from billhook.evaluate.exact import BATCH, Expected
from billhook.evaluate.probes import Answers, Probes
from billhook.measure.patch import observing
from billhook.plan.errors import InputError

Progress = Callable[[str, int, int], None]

ONE_BY_ONE = 12


def answers_step_by_step(model: PreTrainedModel, asked: Probes, progress: Progress | None = None) -> Answers:
    """For each probe and item (see ``probes.posed``) whether greedy decoding writes exactly the right answer.

    Policies tell reading from generating, so at least the last ``ONE_BY_ONE`` tokens before the answer and the answer
    itself are run one at a time with the cache, as generated ones are, and only what comes before is read at once; a
    policy with a warm-up is past it when the answer begins. As in ``exact`` the right tokens are put in place: the
    greedy answer is right if and only if each of its tokens is the argmax after the right ones before it. Prompts of
    about one length share a batch, and as much of each is read as of the shortest, so that nothing is padded. Cost: a
    prefill and some thirty steps a batch. InputError where a logit is NaN.
    """
    flat = [one for items in asked.values() for one in items]
    order = sorted(range(len(flat)), key=lambda place: _begin(flat[place]))
    found: dict[int, bool] = {}
    with observing(model):
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            found |= zip(batch, _right(model, [flat[place] for place in batch]), strict=True)
            if progress is not None:
                progress("probes", len(found), len(flat))
    right = iter(found[place] for place in range(len(flat)))
    return {name: [next(right) for _ in items] for name, items in asked.items()}


def _begin(one: Expected) -> int:
    """The place of the answer's first token."""
    return len(one.ids) - one.answer


def _right(model: PreTrainedModel, asked: Sequence[Expected]) -> list[bool]:
    """Of sequences whose prompts are about as long; what stands behind a row's end counts nowhere."""
    first, end = min(map(_begin, asked)), max(len(one.ids) for one in asked)
    ids = torch.tensor([[*one.ids, *[one.ids[-1]] * (end - len(one.ids))] for one in asked], device=model.device)
    read = max(1, first - ONE_BY_ONE)
    logits, cache = forward(model, ids[:, :read])
    same: list[Tensor] = []
    for place in range(read, end):
        if place >= first:
            last = logits[:, -1]
            if bool(last.isnan().any()):
                raise InputError(f"a logit of {type(model).__name__} is nan under the policy")
            same.append(last.argmax(-1).to(ids.device) == ids[:, place])
        if place < end - 1:
            logits, cache = forward(model, ids[:, place : place + 1], cache)
    table = torch.stack(same, dim=1)
    return [bool(row[_begin(one) - first : len(one.ids) - first].all()) for row, one in zip(table, asked, strict=True)]
