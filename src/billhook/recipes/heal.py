"""The healing of a walk: its text, the healed model, and what is put on record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from billhook.data import Windows
from billhook.data import calibration as windows_of
from billhook.heal import closed_form, healed
from billhook.plan.plan import Plan
from billhook.plan.record import HealRecord
from billhook.recipes.opened import Opened
from billhook.recipes.settings import CALIBRATION_LENGTH, HEALING_TOKENS
from billhook.surgery import apply

Progress = Callable[[str, int, int], None]


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
    """The cut model with new weights of its own for what was refitted; the dense model stays as it is."""
    healing = closed_form(model.model, model.anatomy, plan, windows, progress)
    with healed(model.model, healing):
        compressed = apply(model.model, model.anatomy, plan)
    record = HealRecord(
        method=method,
        tokens=healing.tokens,
        work=healing.work,
        refits=healing.refits,
        left_alone=dict(healing.left_alone),
        divergence=None if healing.cut is None or healing.healed is None else (healing.cut, healing.healed),
        grafts=healing.grafts,
        refused=healing.refused,
    )
    return compressed, record
