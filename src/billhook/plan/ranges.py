"""Lists of numbers as text: ``0-3,7`` for 0, 1, 2, 3, 7."""

from __future__ import annotations

import re
from collections.abc import Sequence

from billhook.plan.errors import InputError

_RANGE = re.compile(r"(0|[1-9][0-9]{0,6})(?:-(0|[1-9][0-9]{0,6}))?")


def parse_ranges(value: object) -> object:
    """Ranges to numbers; anything but a text goes through as it is. InputError where they do not rise."""
    if not isinstance(value, str):
        return value
    numbers: list[int] = []
    for part in value.split(","):
        found = _RANGE.fullmatch(part)
        if not found:
            raise InputError(f"indices are ranges such as 0-511,514, not {part!r}")
        first, last = int(found[1]), int(found[2] or found[1])
        if (found[2] and last <= first) or (numbers and first <= numbers[-1]):
            raise InputError(f"indices must rise; {part!r} does not")
        numbers.extend(range(first, last + 1))
    return tuple(numbers)


def write_ranges(numbers: Sequence[int]) -> str:
    """The shortest ranges for numbers in rising order."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)
