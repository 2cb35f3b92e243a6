"""From the word of a score to the scores of blocks and sublayers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from billhook.data import Windows
from billhook.measure.ablation import Ablator, ablation
from billhook.measure.sums import Trace
from billhook.plan.address import Address
from billhook.recipes.choices import Score
from billhook.recipes.opened import Opened
from billhook.scores import named

Progress = Callable[[str, int, int], None]


def scored(
    word: Score,
    unit: str,
    model: Opened,
    units: Sequence[Address],
    windows: Windows,
    seen: Trace,
    progress: Progress | None,
) -> tuple[dict[Address, float], int]:
    """The score of each of these units of one kind, and the work behind it. ``seen`` is the trace of the dense model
    over the calibration ``windows``; for damage the units are tried one by one instead."""
    score, parameters = named(word.word), word.asked(unit)
    if score.needs == "damage":
        kind = score.check(parameters)["of"]
        ablator = Ablator(model.model, model.anatomy, windows, kind, progress=progress)
        rises = ablation(ablator, units, progress)
        seen = Trace.of_damage(kind, rises, windows.ids.numel()) + Trace(work=ablator.work)
    return score(seen, model.anatomy, **parameters), seen.work
