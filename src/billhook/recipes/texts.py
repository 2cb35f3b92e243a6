"""What a walk reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from billhook.data import Windows
from billhook.data import calibration as windows_of
from billhook.data.calibrate import Domain
from billhook.recipes.opened import Opened
from billhook.recipes.settings import CALIBRATION_LENGTH, CALIBRATION_TOKENS, HEALING_TOKENS
from billhook.recipes.together import of_the_first

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Texts:
    """What is read: by searches, by statistics that one pass gives, by choices that are trained, by healing; and what
    judges. None where no method asks for it."""

    windows: Windows
    survey: Windows | None
    drill: Windows | None
    longer: Windows | None
    judged: tuple[tuple[Domain, Windows], ...]


def calibration_text(model: Opened, calibration: str, seed: int, progress: Progress | None) -> Windows:
    """What a search asks the model about again and again."""
    return _text(model, calibration, seed, progress, CALIBRATION_TOKENS)


def healing_text(
    model: Opened, calibration: str, seed: int, progress: Progress | None, *, tokens: int | None = None
) -> Windows:
    """More of the calibration text than a search needs, as much as there is: regressions have many more unknowns."""
    fewest = 2 * model.length(CALIBRATION_LENGTH)
    return _text(model, calibration, seed, progress, tokens or HEALING_TOKENS, fewest)


def _text(
    model: Opened, calibration: str, seed: int, progress: Progress | None, tokens: int, fewest: int | None = None
) -> Windows:
    return of_the_first(
        lambda: windows_of(
            calibration,
            model.tokenizer,
            tokens=tokens,
            length=model.length(CALIBRATION_LENGTH),
            seed=seed,
            model=model.model,
            fewest=fewest,
            progress=progress,
        )
    )
