"""The training of a walk: its text, where an interrupted one is kept, and what comes of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from billhook.data import Windows
from billhook.data import calibration as windows_of
from billhook.data.calibrate import is_written
from billhook.data.duplicates import distinct, without_duplicates
from billhook.data.source import read
from billhook.data.windows import spread
from billhook.heal import Healing, closed_form
from billhook.heal.held import parted
from billhook.heal.judge import divergences
from billhook.heal.selecting.select import Selection, select
from billhook.heal.training.methods import METHODS
from billhook.heal.training.state import keep, kept
from billhook.heal.training.train import train
from billhook.models import fingerprint
from billhook.plan.plan import Plan
from billhook.plan.record import Graft, HealRecord, HealStep, Refit, SelectionRecord
from billhook.recipes.heal import applied, record_of
from billhook.recipes.opened import Opened, environment
from billhook.recipes.selection import Asked, target_text
from billhook.recipes.settings import SELECTED_FROM, TRAINING_LENGTH
from billhook.recipes.together import of_the_first

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
    step: HealStep,
    start: Healing,
    known: HealRecord | Windows,
    wanted: Windows | Selection,
    tokens: int,
    place: Path,
    progress: Progress | None,
) -> Taught:
    """What ``plan`` leaves of a model, with the tensors of ``start`` in it, trained by the method of ``step``.

    ``known``: what is on record of the healing that ``start`` comes from, or, where there was none, text: it is then
    refitted in closed form on that first, and the training begins with the better of the two on what the refit held
    back of it. A selection is made with that model. What takes long is kept in ``place``.
    """
    method, seed = step.method, step.seed
    begun, chosen = start, wanted if isinstance(wanted, Selection) else None
    lessons = wanted.windows if isinstance(wanted, Selection) else wanted
    if isinstance(known, Windows):
        refit = _refitted(model, plan, known, place, progress)
        begun = better(model, plan, start, refit, parted(known)[1])
        known = record_of(refit)
        if begun is start and not refit.refused:
            known = known.model_copy(update={"refused": True})
    weights, selected = None, None
    if chosen is not None:
        weights, selected = _selected(model, plan, method, begun, chosen, seed, place, progress)
    facts = [*_of(model), _digest(begun), method, lessons.fingerprint, tokens, seed, _edits(plan)]
    facts += [selected.model_dump()] if selected is not None else []
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
        weights=weights,
    )
    record = record.model_copy(update={"selection": selected})
    before, compressed = (applied(model, plan, healing) for healing in (begun, after))
    return Taught(compressed, before, known.model_copy(update={"steps": (*known.steps, step), "training": record}))


def training_text(
    model: Opened, calibration: str, tokens: int, seed: int, place: Path, progress: Progress | None
) -> Windows:
    """Text to train on, and a little to hold back: as much as there is, two windows at least. What the model has to
    write itself is kept in ``place``."""
    length = model.length(TRAINING_LENGTH)
    path = place / f"text-{_key([*_of(model), calibration, tokens, length, seed])}.safetensors"
    with PartialState().main_process_first():
        found = kept(path, {}) if is_written(calibration) else None
        if found is not None:
            return Windows.of(found[0]["ids"], f"{calibration}, seed {seed}")
        windows = windows_of(
            calibration,
            model.tokenizer,
            tokens=_enough(tokens, length),
            length=length,
            seed=seed,
            model=model.model,
            fewest=2 * length,
            progress=progress,
        )
        if is_written(calibration):
            keep(path, {"ids": windows.ids}, {})
    return windows


def selection(
    model: Opened, calibration: str, wanted: Asked, tokens: int, seed: int, place: Path, progress: Progress | None
) -> Selection:
    """Text to select from, four times what the training reads where there is so much, without duplicates."""
    length = model.length(TRAINING_LENGTH)
    target = target_text(model, wanted, length, seed)
    more = tokens * (1 if wanted.word == "distinct" else SELECTED_FROM)
    if is_written(calibration):
        written = training_text(model, calibration, more, seed, place, progress)
        kept_rows = distinct(list(written.ids.numpy()))
        windows, parts, repeated = written, len(written.ids), len(written.ids) - len(kept_rows)
        if repeated:
            windows = Windows.of(written.ids[kept_rows], written.name)
    else:
        front = read(calibration).split()[0]
        text, repeated = without_duplicates(front)
        parts = len(front.parts)
        windows = spread(
            text, model.tokenizer, tokens=_enough(more, length), length=length, seed=seed, fewest=2 * length
        )
    return Selection(wanted.word, windows, max(1, tokens // length), parts, repeated, target)


def better(model: Opened, plan: Plan, before: Healing, after: Healing, held: Tensor) -> Healing:
    """``after``, unless ``before`` is nearer to the dense model on windows that ``after`` was not fitted on. Of several
    processes the first one decides: on other devices a narrow choice could come out the other way."""
    was, now = of_the_first(lambda: divergences(model.model, model.anatomy, plan, [before, after], held))
    return after if now <= was else before


def _refitted(model: Opened, plan: Plan, text: Windows, place: Path, progress: Progress | None) -> Healing:
    """``closed_form``, by all processes, kept in ``place``: the training that follows may be interrupted."""
    path = place / f"refitted-{_key([*_of(model), text.fingerprint, _edits(plan)])}.safetensors"
    found = kept(path, {}) if of_the_first(path.exists) else None
    if found is None:
        healing = closed_form(model.model, model.anatomy, plan, text, progress)
        facts = {name: getattr(healing, name) for name in ("tokens", "work", "cut", "healed")}
        lists = {name: [row.model_dump() for row in getattr(healing, name)] for name in ("refits", "grafts")}
        noted = {**facts, **lists, "left_alone": dict(healing.left_alone)}
        of_the_first(lambda: keep(path, healing.tensors, noted))
        return healing
    tensors, facts = found
    placed = {name: tensor.to(model.model.device) for name, tensor in tensors.items()}
    refits = tuple(Refit(**refit) for refit in facts.pop("refits"))
    grafts = tuple(Graft(**graft) for graft in facts.pop("grafts"))
    return Healing(tensors=placed, refits=refits, grafts=grafts, **facts)


def _of(model: Opened) -> list[Any]:
    """What all that is kept depends on: what another model left there must not be taken for this one's. Which of
    several devices it was computed on is no such thing: processes that work together have one each."""
    return [fingerprint(model.model), {**environment(model), "device": model.model.device.type}]


def _digest(healing: Healing) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(healing.tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _edits(plan: Plan) -> list[Any]:
    edits = [edit.model_dump(mode="json") for edit in plan.edits]
    return [*edits, plan.arrays.digest] if plan.arrays else edits


def _selected(
    model: Opened,
    plan: Plan,
    method: str,
    start: Healing,
    chosen: Selection,
    seed: int,
    place: Path,
    progress: Progress | None,
) -> tuple[Tensor | None, SelectionRecord]:
    """``select``, kept in ``place``: what an interrupted training read it goes on reading, to the last bit."""
    target = chosen.target.fingerprint if chosen.target is not None else ""
    facts = [*_of(model), _digest(start), method, chosen.word, chosen.windows.fingerprint, target, chosen.count, seed]
    facts += _edits(plan)
    path = place / f"selected-{_key(facts)}.safetensors"
    with PartialState().main_process_first():
        found = kept(path, {})
        if found is None:
            goal = METHODS[method].goal
            weights, record = select(model.model, model.anatomy, plan, start, chosen, goal, seed, progress)
            keep(path, {} if weights is None else {"weights": weights}, {"record": record.model_dump()})
            return weights, record
    tensors, noted = found
    return tensors.get("weights"), SelectionRecord.model_validate(noted["record"])


def _enough(tokens: int, length: int) -> int:
    """Tokens to train on, and a little to hold back."""
    return max(2 * length, tokens * 8 // 7 + length)


def _key(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
