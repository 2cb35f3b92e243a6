"""Searches that ask the model again and again, with a ledger of what it answered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from billhook import search
from billhook.data import Windows
from billhook.measure.ablation import Ablator, Kind
from billhook.models import fingerprint
from billhook.plan.address import Address
from billhook.plan.plan import Keep
from billhook.recipes.choices import Evolve, Greedy
from billhook.recipes.opened import Opened, versions
from billhook.search import Found, Ledger, Memo, Problem, Stage
from billhook.search.evolve_widths import Narrowed, Widths, evolve_widths, keeps_of
from billhook.search.objective import C
from billhook.search.width import WidthProblem

Progress = Callable[[str, int, int], None]


def greedily(
    choice: Greedy,
    problem: Problem,
    windows: Windows,
    memo: Callable[[Windows], Memo[Address]],
    progress: Progress | None,
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
    memo: Callable[[Windows], Memo[Address]],
    seed: int,
    progress: Progress | None,
) -> Found:
    """The search by evolution, from what a greedy one finds where the recipe says so."""
    start = greedily(choice.start, problem, windows, memo, progress)[0] if choice.start else None
    return search.evolve(
        problem,
        _stages(choice, windows, memo),
        generations=choice.generations,
        offspring=choice.offspring,
        patience=choice.patience,
        seed=seed,
        start=start,
        progress=progress,
    )


def evolved_widths(
    choice: Evolve,
    problem: WidthProblem,
    scores: Mapping[Address, Tensor],
    windows: Windows,
    kind: Kind,
    model: Opened,
    place: Path,
    seed: int,
    progress: Progress | None,
) -> tuple[tuple[Keep, ...], float, int, int]:
    """What the search by evolution keeps, its figure, and the work and the evaluations that this took."""

    def memo(text: Windows) -> Memo[Narrowed]:
        ablator = Ablator(model.model, model.anatomy, text, kind, progress=progress)
        return Memo(Narrowing(ablator, problem, scores), ledger_of(place, kind, model, text, units=_digest(scores)))

    stages = _stages(choice, windows, memo)
    keeps, value = evolve_widths(
        problem,
        scores,
        stages,
        generations=choice.generations,
        offspring=choice.offspring,
        patience=choice.patience,
        seed=seed,
        progress=progress,
    )
    memos = [stage.memo for stage in stages]
    return keeps, value, sum(memo.work for memo in memos), sum(memo.evaluations for memo in memos)


def _stages(choice: Evolve, windows: Windows, memo: Callable[[Windows], Memo[C]]) -> list[Stage[C]]:
    stages = [Stage(memo(windows.share(screen.share)), screen.survivors) for screen in choice.screens]
    return [*stages, Stage(memo(windows), 1)]


class Narrowing:
    """The objective of narrowed sublayers, in which units went in the order of ``scores``. Nothing is committed: every
    look costs the blocks from the first narrow one on."""

    def __init__(self, ablator: Ablator, problem: WidthProblem, scores: Mapping[Address, Tensor]) -> None:
        self._ablator, self._problem, self._scores = ablator, problem, scores

    @property
    def work(self) -> int:
        return self._ablator.work

    def at(self, widths: Widths) -> float:
        return self._ablator.narrowed(*keeps_of(self._problem, self._scores, widths))

    def move(self, widths: Widths) -> None:
        pass


def _digest(scores: Mapping[Address, Tensor]) -> str:
    """Which units are left at a width."""
    digest = hashlib.sha256()
    for address in sorted(scores):
        digest.update(str(address).encode() + scores[address].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def memo_of(kind: Kind, model: Opened, place: Path, progress: Progress | None, windows: Windows) -> Memo[Address]:
    """An objective over windows, with the ledger that keeps what it was paid for."""
    ablator = Ablator(model.model, model.anatomy, windows, kind, progress=progress)
    return Memo(ablator, ledger_of(place, kind, model, windows))


def ledger_of(place: Path, kind: Kind, model: Opened, windows: Windows, **further: object) -> Ledger:
    """The ledger of this search: one file for everything that an evaluation of the objective depends on."""
    header: dict[str, object] = {
        "model": fingerprint(model.model),
        "dtype": str(model.model.dtype),
        "device": str(model.model.device),
        "calibration": windows.fingerprint,
        "objective": kind,
        **further,
        **versions(),
    }
    place.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(json.dumps(header).encode()).hexdigest()[:12]
    return Ledger(place / f"{name}.jsonl", header)
