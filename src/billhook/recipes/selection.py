"""What ``--select`` asks for: its words, and the texts that a selection needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from billhook.data import Windows
from billhook.data import calibration as windows_of
from billhook.data.calibrate import is_exercised
from billhook.data.exercises import SUFFIX
from billhook.plan.errors import InputError
from billhook.plan.heals import TRAINED
from billhook.plan.record import Select
from billhook.recipes.opened import Opened
from billhook.recipes.settings import TARGET_TOKENS
from billhook.recipes.together import of_the_first

TARGETED = ("dsir", "gradient")


@dataclass(frozen=True)
class Asked:
    """A word for selecting, and the source of the text that it is to be like ("" for none)."""

    word: Select
    target: str = ""


def asked(select: str, method: str, calibrated_on: str = "", text: str = "") -> Asked | None:
    """What ``WORD`` or ``WORD:SOURCE`` says; None for ``none``. A target that is not named is the text that the cut
    was ``calibrated_on``, where the training reads another ``text``. InputError for anything that cannot be done."""
    word, _, target = select.partition(":")
    found: Select | None = next((known for known in get_args(Select) if known == word), None)
    if word == "none" and not target:
        return None
    if found is None:
        raise InputError(f"selection {select} is unknown; --select takes none, {', '.join(get_args(Select))}")
    if method not in TRAINED:
        raise InputError(f"--select chooses text to train on, and {method} does not train; use {', '.join(TRAINED)}")
    if word not in TARGETED:
        if target:
            raise InputError(f"--select {word} has no target; leave out :{target}")
        return Asked(found)
    if not target and calibrated_on == text:
        raise InputError(f"--select {word} needs a target other than the text itself: --select {word}:SOURCE")
    return Asked(found, target or calibrated_on)


def require_one_text(wanted: Asked | None, source: str) -> None:
    """InputError where exercises stand among the text that is to be selected from."""
    if wanted is not None and is_exercised(source):
        raise InputError(f"--select {wanted.word} chooses within one text; leave out {SUFFIX}")


def target_text(model: Opened, wanted: Asked, length: int, seed: int) -> Windows | None:
    """The windows that a selection is to be like: the front of the target, as much as there is."""
    if not wanted.target:
        return None
    return of_the_first(
        lambda: windows_of(
            wanted.target,
            model.tokenizer,
            tokens=TARGET_TOKENS,
            length=length,
            seed=seed,
            model=model.model,
            fewest=length,
        )
    )
