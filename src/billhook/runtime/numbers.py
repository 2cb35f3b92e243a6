"""Block numbers as people write them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby

from billhook.plan.errors import InputError

_PART = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


def read_numbers(text: str) -> list[int]:
    """``0-3+7+7`` -> [0, 1, 2, 3, 7, 7], in the order written; the empty text is no number. InputError for anything
    else."""
    numbers: list[int] = []
    for part in text.split("+") if text else ():
        found = _PART.fullmatch(part.strip())
        if not found:
            raise InputError(f"{part!r} is neither a block number nor a range such as 3-7 (join several with +)")
        first, last = int(found[1]), int(found[2] or found[1])
        numbers += range(first, last + 1) if first <= last else range(first, last - 1, -1)
    return numbers


def write_numbers(numbers: Iterable[int]) -> str:
    """The shortest such text for numbers in rising runs."""
    runs = []
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return "+".join(runs)
