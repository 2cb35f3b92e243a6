"""Whether a model writes exactly the right tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from transformers import PreTrainedModel

from billhook.data.decoding import forward
from billhook.data.windows import prefix_of
from billhook.evaluate.logits import logits_by_slice
from billhook.measure.patch import observing
from billhook.plan.errors import InputError

BATCH = 16


@dataclass(frozen=True)
class Expected:
    """The tokens of a prompt and its answer, of which the last ``answer`` >= 1 are the model's to write."""

    ids: tuple[int, ...]
    answer: int


def expected(tokenizer: Any, prompt: str, answer: str) -> Expected:
    """Prompt and answer tokenised as one text; the answer begins at the first token that the prompt alone would not
    have. Begins with BOS exactly where the tokenizer puts one by itself."""
    before, whole = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, prompt + answer))
    prefix = prefix_of(tokenizer)
    shared = next((n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
    if len(prefix) + shared == 0 or shared >= len(whole):
        raise InputError(f"the tokenizer has no tokens for the answer {answer!r} after {prompt!r}")
    return Expected((*prefix, *whole), len(whole) - shared)


def exact(model: PreTrainedModel, asked: Sequence[Expected], tick: Callable[[int], None] | None = None) -> list[bool]:
    """For each answer whether greedy decoding writes it token by token.

    Decided by one forward with the right answer in place: greedy decoding writes it if and only if each of its tokens
    is the argmax after the prompt and the right tokens before it. What all sequences begin with is read once, and its
    keys and values go on with each. Shorter sequences of a batch are filled up behind their end, where a causal model
    does not look. ``tick`` is told how many sequences were just done. Raises InputError where a logit is NaN. Cost: one
    trunk over all tokens but those that are shared, one head over those of the answers.
    """
    found: dict[int, bool] = {}
    shared = _shared(asked)
    order = sorted(range(len(asked)), key=lambda place: len(asked[place].ids))
    with observing(model):
        begun = forward(model, torch.tensor([shared], device=model.device))[1] if shared else None
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            found |= zip(batch, _right(model, [asked[place] for place in batch], len(shared), begun), strict=True)
            if tick is not None:
                tick(len(batch))
    return [found[place] for place in range(len(asked))]


def _shared(asked: Sequence[Expected]) -> tuple[int, ...]:
    """The tokens that all begin with, short of the one that the first answer is predicted at."""
    if len(asked) < 2:
        return ()
    most = min(len(one.ids) - one.answer for one in asked) - 1
    columns = zip(*(one.ids[:most] for one in asked), strict=True)
    return tuple(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))


def _right(model: PreTrainedModel, asked: Sequence[Expected], shared: int, begun: Any) -> list[bool]:
    """``begun`` is the cache [1 row] of the tokens that all share."""
    cache = copy.deepcopy(begun)
    if cache is not None:
        cache.batch_repeat_interleave(len(asked))
    width, first = max(len(one.ids) for one in asked), min(len(one.ids) - one.answer for one in asked)
    ids = torch.tensor([[*one.ids, *one.ids[-1:] * (width - len(one.ids))] for one in asked], device=model.device)
    logits = logits_by_slice(model, ids[:, shared:-1], cache)(slice(first - 1 - shared, None))
    if bool(logits.isnan().any()):
        raise InputError(
            f"a logit of {type(model).__name__} is nan; its weights must be finite and its dtype must hold its "
            "activations"
        )
    same = logits.argmax(-1).to(ids.device) == ids[:, first:]
    ends = [len(one.ids) - first for one in asked]
    return [bool(row[end - one.answer : end].all()) for row, end, one in zip(same, ends, asked, strict=True)]
