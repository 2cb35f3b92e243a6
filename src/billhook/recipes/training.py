"""The training of a walk: its text, where an interrupted one is kept, and what comes of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from billhook.data import Windows
from billhook.data import calibration as windows_of
from billhook.heal import Healing, closed_form, healed
from billhook.heal.judge import divergences
from billhook.heal.loop import split
from billhook.heal.state import keep, kept
from billhook.heal.train import train
from billhook.heal.training import METHODS
from billhook.plan.plan import Plan
from billhook.plan.record import HealRecord, Refit
from billhook.recipes.heal import storable
from billhook.recipes.opened import Opened
from billhook.recipes.settings import TRAINING_LENGTH
from billhook.recipes.workplace import claimed, workplace
from billhook.surgery import apply

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Taught:
    """The trained model, the one that the training began with, and the record of both."""

    compressed: Any
    begun: Any
    record: HealRecord


def taught(
    model: Opened,
    plan: Plan,
    method: str,
    start: Healing,
    known: HealRecord | None,
    text: Windows,
    lessons: Windows,
    tokens: int,
    seed: int,
    place: Path,
    progress: Progress | None,
) -> Taught:
    """What ``plan`` leaves of a model, with the tensors of ``start`` in it, trained by a method of that name.

    Where nothing was healed yet (``known`` is None) it is refitted in closed form on ``text`` first, and the training
    begins with the better of the two on the held-back part of ``lessons``. What takes long is kept in ``place``.
    """
    begun = start
    if known is None:
        refit = _refitted(model, plan, text, place, progress)
        begun = better(model, plan, start, refit, lessons)
        known = HealRecord(
            method=method, tokens=refit.tokens, work=refit.work, refits=begun.refits, left_alone=dict(refit.left_alone)
        )
    facts = [method, lessons.fingerprint, text.fingerprint, tokens, seed, _edits(plan)]
    after, record = train(
        model.model,
        model.anatomy,
        plan,
        begun,
        lessons,
        replace(METHODS[method], seed=seed),
        tokens=tokens,
        state=place / f"training-{_key(facts)}.safetensors",
        progress=progress,
    )
    begun, after = (storable(model, healing) for healing in (begun, after))
    with healed(model.model, begun):
        before = apply(model.model, model.anatomy, plan)
    with healed(model.model, after):
        compressed = apply(model.model, model.anatomy, plan)
    return Taught(compressed, before, known.model_copy(update={"method": method, "training": record}))


def training_text(
    model: Opened, calibration: str, tokens: int, seed: int, place: Path, progress: Progress | None
) -> Windows:
    """Text to train on, and a little to hold back: as much as there is, two windows at least. What the model has to
    write itself is kept in ``place``."""
    length = model.length(TRAINING_LENGTH)
    path = place / f"text-{_key([calibration, tokens, length, seed])}.safetensors"
    with PartialState().main_process_first():
        found = kept(path, {}) if calibration == "self" else None
        if found is not None:
            return Windows.of(found[0]["ids"], f"self, seed {seed}")
        windows = windows_of(
            calibration,
            model.tokenizer,
            tokens=max(2 * length, tokens * 8 // 7 + length),
            length=length,
            seed=seed,
            model=model.model,
            fewest=2 * length,
            progress=progress,
        )
        if calibration == "self":
            keep(path, {"ids": windows.ids}, {})
    return windows


def better(model: Opened, plan: Plan, before: Healing, after: Healing, windows: Windows) -> Healing:
    """``after``, unless ``before`` is nearer to the dense model on the windows that a training would hold back."""
    _, held = split(windows.ids)
    was, now = divergences(model.model, model.anatomy, plan, [before, after], held)
    return after if now <= was else before


@contextmanager
def shared(out: str | os.PathLike[str]) -> Iterator[tuple[Path, bool]]:
    """The workplace of ``out``, held by the first process of all that work on it together (see ``claimed``), and
    whether this is the first one."""
    if PartialState().is_main_process:
        with claimed(out) as place:
            yield place, True
    else:
        yield workplace(out), False


def _refitted(model: Opened, plan: Plan, text: Windows, place: Path, progress: Progress | None) -> Healing:
    """``closed_form``, kept in ``place``: the training that follows may be interrupted."""
    path = place / f"refitted-{_key([text.fingerprint, _edits(plan)])}.safetensors"
    with PartialState().main_process_first():
        found = kept(path, {})
        if found is None:
            healing = closed_form(model.model, model.anatomy, plan, text, progress)
            counts = {"left_alone": dict(healing.left_alone), "tokens": healing.tokens, "work": healing.work}
            keep(path, healing.tensors, {**counts, "refits": [refit.model_dump() for refit in healing.refits]})
            return healing
    tensors, facts = found
    placed = {name: tensor.to(model.model.device) for name, tensor in tensors.items()}
    refits = tuple(Refit(**refit) for refit in facts["refits"])
    return Healing(placed, refits, facts["left_alone"], facts["tokens"], facts["work"])


def _edits(plan: Plan) -> list[Any]:
    return [edit.model_dump(mode="json") for edit in plan.edits]


def _key(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
