"""Searches that ask the model again and again, with a ledger of what it answered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from billhook import search
from billhook.data import Windows
from billhook.measure.ablation import Ablator, Kind
from billhook.models import fingerprint
from billhook.plan.address import Address
from billhook.recipes.choices import Evolve, Greedy
from billhook.recipes.opened import Opened, versions
from billhook.search import Found, Ledger, Memo, Problem

Progress = Callable[[str, int, int], None]


def greedily(
    choice: Greedy, problem: Problem, windows: Windows, memo: Callable[[Windows], Memo], progress: Progress | None
) -> tuple[Found, dict[Address, float]]:
    """The search, and by how much each unit alone raises the objective."""
    first = memo(windows.share(choice.screen))
    empty = first.at(frozenset())
    rises = {}
    for number, unit in enumerate(problem.candidates, start=1):
        rises[unit] = first.at(frozenset({unit}), frozenset()) - empty
        if progress is not None:
            progress("every unit once", number, len(problem.candidates))
    screened = choice.screen < 1
    full = memo(windows) if screened else first
    if problem.budget.until_cliff:
        found = search.greedy_until_cliff(
            problem, full, lazy=choice.lazy, per=choice.per, estimates=rises, progress=progress
        )
    else:
        found = search.greedy(
            problem,
            full,
            lazy=choice.lazy,
            per=choice.per,
            refine=choice.refine,
            estimates=rises,
            progress=progress,
        )
    if screened:
        steps = tuple(step.model_copy(update={"work": step.work + first.work}) for step in found.steps)
        found = Found(found.drops, steps, found.work + first.work, found.evaluations + first.evaluations)
    return found, rises


def evolved(
    choice: Evolve,
    problem: Problem,
    windows: Windows,
    memo: Callable[[Windows], Memo],
    seed: int,
    progress: Progress | None,
) -> Found:
    """The search by evolution, from what a greedy one finds where the recipe says so."""
    start = greedily(choice.start, problem, windows, memo, progress)[0] if choice.start else None
    stages = [search.Stage(memo(windows.share(screen.share)), screen.survivors) for screen in choice.screens]
    return search.evolve(
        problem,
        [*stages, search.Stage(memo(windows), 1)],
        generations=choice.generations,
        offspring=choice.offspring,
        patience=choice.patience,
        seed=seed,
        start=start,
        progress=progress,
    )


def memo_of(kind: Kind, model: Opened, place: Path, progress: Progress | None, windows: Windows) -> Memo:
    """An objective over windows, with the ledger that keeps what it was paid for."""
    ablator = Ablator(model.model, model.anatomy, windows, kind, progress=progress)
    return Memo(ablator, ledger_of(place, kind, model, windows))


def ledger_of(place: Path, kind: Kind, model: Opened, windows: Windows) -> Ledger:
    """The ledger of this search: one file for everything that an evaluation of the objective depends on."""
    header: dict[str, object] = {
        "model": fingerprint(model.model),
        "dtype": str(model.model.dtype),
        "device": str(model.model.device),
        "calibration": windows.fingerprint,
        "objective": kind,
        **versions(),
    }
    place.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(json.dumps(header).encode()).hexdigest()[:12]
    return Ledger(place / f"{name}.jsonl", header)
