"""Two thresholds at once, along the edge of what a quality target allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

LEVELS = 8


def frontier(
    meets: Callable[[float, float], bool], first: tuple[float, float], second: tuple[float, float], levels: int = LEVELS
) -> Iterator[tuple[float, float]]:
    """The settings of two dials that meet a goal, as far as turning either on breaks it; each dial is given as its
    quiet and its loud end, and takes ``levels`` + 1 values at equal distances from one to the other.

    Quality falls as either dial is turned on. So the walk begins with the first one quiet and the second loud; where
    the goal is met it turns the first one on, else the second one back: at most 2 ``levels`` + 1 settings are tried,
    where all of them are (``levels`` + 1)^2. Source: the frontier search of MoDES (arXiv 2511.15690).
    """
    one, other = 0, levels
    while one <= levels and other >= 0:
        setting = (_at(first, one / levels), _at(second, other / levels))
        if meets(*setting):
            yield setting
            one += 1
        else:
            other -= 1


def _at(ends: tuple[float, float], place: float) -> float:
    return ends[0] + place * (ends[1] - ends[0])
