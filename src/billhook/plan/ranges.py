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
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs(numbers))


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
