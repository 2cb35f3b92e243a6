"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from billhook.plan.record import Interval

_STEPS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float, digits: int = 3) -> str:
    """``digits`` significant digits, never an exponent for sizes of daily life: 1,234, 22.8, 0.0312."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    if places > 8:
        return f"{value:.{digits - 1}e}"
    return f"{round(value, places):,.{max(places, 0)}f}"


def quantity(value: float, unit: str) -> str:
    """A size with its unit: ``106 M parameters``, ``269 MB``, ``23 kB per token``, ``25 blocks``; kB is 1,000 bytes."""
    if value < 1000 and float(value).is_integer():
        scaled, prefix = f"{value:.0f}", ""
    else:
        size, prefix = next(((s, p) for s, p in _STEPS if abs(value) >= s), (1.0, ""))
        scaled = number(value / size)
    if unit.startswith("bytes"):
        return f"{scaled} {prefix}B{unit.removeprefix('bytes')}"
    if unit == "FLOPs":
        return f"{scaled} {prefix}FLOPs"
    return f"{scaled}{' ' + prefix if prefix else ''} {unit}"


def bare(value: float, unit: str) -> str:
    """As ``quantity``, without the unit where the row's name says it already."""
    return (
        quantity(value, unit).removesuffix(unit).rstrip() if unit in ("parameters", "blocks") else quantity(value, unit)
    )


def percent(fraction: float) -> str:
    """``0.2`` as ``20.0%``; two digits below one percent."""
    return f"{100 * fraction:.1f}%" if abs(fraction) >= 0.01 or fraction == 0 else f"{100 * fraction:.2g}%"


def spread(interval: Interval, as_percent: bool = False) -> str:
    """The range alone: ``21.9 to 23.7``."""
    show = percent if as_percent else number
    return f"{show(interval.low)} to {show(interval.high)}"


def points(difference: Interval) -> str:
    """A difference of shares in points, with its range: ``−71 (−90 to −51)``."""
    value, low, high = (
        f"{round(100 * share):+d}".replace("+0", "0").replace("-", "−")
        for share in (difference.value, difference.low, difference.high)
    )
    return f"{value} ({low} to {high})"


def duration(seconds: float) -> str:
    """``0.42 s``, ``37 s``, ``4 min 05 s``, ``2 h 10 min``."""
    if seconds < 60:
        return f"{number(seconds, 2)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def ranges(numbers: Iterable[int]) -> str:
    """Block numbers, runs drawn together: ``3, 11–13, 20``."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)
