"""Whether a model writes exactly the right tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

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
    is the argmax after the prompt and the right tokens before it. Only sequences of one length share a batch, so
    nothing is ever padded. ``tick`` is told how many sequences were just done. Raises InputError where a logit is NaN.
    Cost: one trunk over all tokens, one head over those of the answers.
    """
    found: dict[int, bool] = {}
    lengths: dict[int, list[int]] = {}
    for place, one in enumerate(asked):
        lengths.setdefault(len(one.ids), []).append(place)
    with observing(model):
        for places in lengths.values():
            for start in range(0, len(places), BATCH):
                batch = places[start : start + BATCH]
                found |= zip(batch, _right(model, [asked[place] for place in batch]), strict=True)
                if tick is not None:
                    tick(len(batch))
    return [found[place] for place in range(len(asked))]


def _right(model: PreTrainedModel, asked: Sequence[Expected]) -> list[bool]:
    """Of sequences of equal length."""
    ids = torch.tensor([one.ids for one in asked], device=model.device)
    longest = max(one.answer for one in asked)
    logits = logits_by_slice(model, ids[:, :-1])(slice(ids.shape[1] - 1 - longest, None))
    if bool(logits.isnan().any()):
        raise InputError(
            f"a logit of {type(model).__name__} is nan; its weights must be finite and its dtype must hold its "
            "activations"
        )
    same = logits.argmax(-1).to(ids.device) == ids[:, -longest:]
    return [bool(row[-one.answer :].all()) for row, one in zip(same, asked, strict=True)]
