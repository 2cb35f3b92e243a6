"""The healing of a walk: its text, the healed model, and what is put on record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from billhook.anatomy import Anatomy
from billhook.data import Windows
from billhook.data import calibration as windows_of
from billhook.heal import Healing, average, branch_gains, closed_form, fuse, healed
from billhook.plan.plan import Plan
from billhook.plan.record import HealRecord
from billhook.recipes.opened import Opened
from billhook.recipes.settings import CALIBRATION_LENGTH, HEALING_TOKENS
from billhook.surgery import apply

Progress = Callable[[str, int, int], None]


def _average(model: Any, anatomy: Anatomy, plan: Plan, windows: Windows, progress: Progress | None) -> Healing:
    return average(model, anatomy, plan)


METHODS: Mapping[str, Callable[[Any, Anatomy, Plan, Windows, Progress | None], Healing]] = {
    "closed-form": closed_form,
    "average": _average,
    "fuse": fuse,
    "gains": branch_gains,
}
"""Where new weights for what is left come from, by the words of a recipe (``heal`` and ``act``)."""


def healing_text(model: Opened, calibration: str, seed: int, progress: Progress | None) -> Windows:
    """More of the calibration text than a search needs, as much as there is: regressions have many more unknowns."""
    length = model.length(CALIBRATION_LENGTH)
    return windows_of(
        calibration,
        model.tokenizer,
        tokens=HEALING_TOKENS,
        length=length,
        seed=seed,
        model=model.model,
        fewest=2 * length,
        progress=progress,
    )


def mended(
    model: Opened, plan: Plan, method: str, windows: Windows, progress: Progress | None
) -> tuple[Any, HealRecord]:
    """The cut model with new weights of its own for what was refitted; the dense model stays as it is. ``method`` is a
    way to heal, or an act that combines blocks."""
    healing = METHODS[method](model.model, model.anatomy, plan, windows, progress)
    with healed(model.model, healing):
        compressed = apply(model.model, model.anatomy, plan)
    record = HealRecord(
        method=method,
        tokens=healing.tokens,
        work=healing.work,
        refits=healing.refits,
        left_alone=dict(healing.left_alone),
    )
    return compressed, record
