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

    Policies tell reading from generating, so the last ``ONE_BY_ONE`` tokens before the answer and the answer itself
    are run one at a time with the cache, as generated ones are, and only what comes before is read at once; a policy
    with a warm-up is past it when the answer begins. As in ``exact`` the right tokens are put in place: the greedy
    answer is right if and only if each of its tokens is the argmax after the right ones before it. Sequences of one
    length of prompt share a batch, nothing is padded. Cost: a prefill and about twenty steps a batch. InputError where
    a logit is NaN.
    """
    flat = [one for items in asked.values() for one in items]
    found: dict[int, bool] = {}
    lengths: dict[int, list[int]] = {}
    for place, one in enumerate(flat):
        lengths.setdefault(len(one.ids) - one.answer, []).append(place)
    with observing(model):
        for places in lengths.values():
            for start in range(0, len(places), BATCH):
                batch = places[start : start + BATCH]
                found |= zip(batch, _right(model, [flat[place] for place in batch]), strict=True)
                if progress is not None:
                    progress("probes", len(found), len(flat))
    right = iter(found[place] for place in range(len(flat)))
    return {name: [next(right) for _ in items] for name, items in asked.items()}


def _right(model: PreTrainedModel, asked: Sequence[Expected]) -> list[bool]:
    """Of sequences whose answers begin at the same place; what follows a short answer in its row counts nowhere."""
    begin, end = len(asked[0].ids) - asked[0].answer, max(len(one.ids) for one in asked)
    rows = [[*one.ids, *[one.ids[-1]] * (end - len(one.ids))] for one in asked]
    ids = torch.tensor(rows, device=model.device)
    read = max(1, begin - ONE_BY_ONE)
    logits, cache = forward(model, ids[:, :read])
    same: list[Tensor] = []
    for place in range(read, end):
        if place >= begin:
            last = logits[:, -1]
            if bool(last.isnan().any()):
                raise InputError(f"a logit of {type(model).__name__} is nan under the policy")
            same.append(last.argmax(-1).to(ids.device) == ids[:, place])
        if place < end - 1:
            logits, cache = forward(model, ids[:, place : place + 1], cache)
    table = torch.stack(same, dim=1)
    return [bool(row[: one.answer].all()) for row, one in zip(table, asked, strict=True)]
