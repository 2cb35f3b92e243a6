"""Exercises among a text: a cut model loses exact answers first, and no ordinary text asks for many."""

from __future__ import annotations

import random
from typing import Any

from billhook.data.questions import PROBES, questions
from billhook.data.text import Text
from billhook.data.windows import Windows, first

SUFFIX = "+exercises"
EVERY = 8  # windows, of which one is exercises
_LINES = (5, 9)  # of one kind in a row, so that those before show what is asked


def with_exercises(windows: Windows, tokenizer: Any, seed: int = 0) -> Windows:
    """The windows [n, length], every eighth of which (the fifth of each eight) is replaced by exercises.

    An exercise is a question of a kind that ``questions`` asks, with its answer behind it, a few of one kind in a row;
    none of the questions that judge a model is among them, nor their examples. The same seed gives the same ones.
    """
    ids = windows.ids.clone()
    here = range(EVERY // 2, len(ids), EVERY)
    if here:
        tokens = len(here) * ids.shape[1]
        ids[here.start :: EVERY] = first(exercises(6 * tokens, seed), tokenizer, tokens=tokens, length=ids.shape[1]).ids
    return Windows.of(ids, f"{windows.name}{SUFFIX}")


def exercises(characters: int, seed: int = 0) -> Text:
    """As many exercises as give so much text, or a little more."""
    judged = {line for of_probe in questions().values() for one in of_probe for line in one.lines}
    draw = random.Random(f"exercises {seed + 1}")
    parts: list[str] = []
    size = 0
    while size < characters:
        ask = PROBES[draw.choice(list(PROBES))]
        lines = ["".join(ask(draw)) for _ in range(draw.randint(*_LINES))]
        parts.append("".join(f"{line}\n" for line in lines if line not in judged) + "\n")
        size += len(parts[-1])
    return Text("exercises", tuple(parts))
