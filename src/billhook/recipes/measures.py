"""What a walk measures of the dense model, in the form of its record."""

from __future__ import annotations

from collections.abc import Callable

from billhook.data import Windows
from billhook.measure.sums import Trace
from billhook.measure.trace import trace
from billhook.plan.record import Measures
from billhook.recipes.opened import Opened
from billhook.scores.registry import named

Progress = Callable[[str, int, int], None]
#: Scores that one pass over the calibration gives for blocks and for sublayers.
SHOWN = ("block-influence", "update-norm")


def watch(model: Opened, windows: Windows, progress: Progress | None) -> Trace:
    """One pass with every statistic that the report draws."""
    return trace(model.model, model.anatomy, windows, ("block", "sublayer", "angular"), progress)


def measures(
    model: Opened, source: str, windows: Windows, seen: Trace, more: dict[str, dict[str, float]] | None = None
) -> Measures:
    """The record of a trace over windows from ``source``: each score once for blocks and once for sublayers, the
    angular distances, and ``more`` scores."""
    scores = {}
    for name in SHOWN:
        for unit in ("block", "sublayer"):
            found = named(name)(seen, model.anatomy, unit=unit)
            scores[f"{name}, {unit}s"] = {str(address): value for address, value in found.items()}
    return Measures(
        scores=scores | (more or {}),
        angular={name: seen.angular(name) for name in seen.angles},
        calibration=source,
        tokens=windows.ids.numel(),
    )
