"""Many small changes tried on little text, the best of them on more."""

from __future__ import annotations

import random
from collections.abc import Sequence, Set
from dataclasses import dataclass

from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.search.ledger import Memo
from billhook.search.objective import Drops, Progress
from billhook.search.path import Found, Path
from billhook.search.problem import Problem

_TRIES = 100  # mutants drawn for one that is new


@dataclass(frozen=True)
class Stage:
    """Who is looked at on what: the objective, and how many of those looked at survive it."""

    memo: Memo
    survivors: int


def evolve(
    problem: Problem,
    stages: Sequence[Stage],
    *,
    generations: int,
    offspring: int,
    patience: int,
    seed: int = 0,
    start: Found | None = None,
    progress: Progress | None = None,
) -> Found:
    """Evolutionary search with one parent (EvoPress, Sieberling et al. 2024, section 3 and algorithm 1): ``offspring``
    mutants a generation; each stage looks at those that the one before let through, on more text; the last stage lets
    one through, which becomes the parent where it is better than the parent on the whole calibration. Ends after
    ``generations``, or after ``patience`` of them without a better parent.

    A mutation switches levels, as in the paper: some units come back, as many others go; how many is the smaller of
    two draws from 1 to 3. Where units differ in size (the paper switches only within a kind), units go at random until
    the budget is met again, and what it then does not need comes back at random.

    Without a ``start`` the parent is the one of as many random solutions as there are offspring that survives all
    stages. The parent's own figure is always that of the last stage, so that a lucky one on little text is not kept.

    Cost, on top of the start's: a generation evaluates ``offspring`` sets on the first stage, and the survivors of
    each stage on the next.
    Raises InputError where every start breaks the model.
    """
    draw = random.Random(seed)
    last = stages[-1].memo
    path = Path(problem)
    if start is None:
        dense: Drops = frozenset()
        path.step(_best(_around(problem, dense, offspring, {dense}, draw), stages, dense))
    else:
        path = Path(problem, _single(start.drops, problem), start.steps)
    paid = start.work if start is not None else 0

    def work() -> int:
        return paid + sum(stage.memo.work for stage in stages)

    value = last.at(path.drops)
    if value == float("inf"):
        raise InputError(f"budget {problem.budget} is too small: every solution that was tried breaks the model")
    if start is None:
        path.steps[-1] = path.steps[-1].model_copy(update={"objective": value, "work": work()})

    seen, idle = {path.drops}, 0
    for generation in range(generations):
        if progress is not None:
            progress("generations", generation, generations)
        mutants = _around(problem, path.drops, offspring, seen, draw)
        if not mutants or idle == patience:
            break
        best = _best(mutants, stages, path.drops)
        idle += 1
        if last.at(best, path.drops) < value:
            value, idle = last.at(best, path.drops), 0
            path.step(best - path.drops, path.drops - best, objective=value, work=work())
    if progress is not None:
        progress("generations", generations, generations)
    evaluations = sum(stage.memo.evaluations for stage in stages)
    return path.found(work(), evaluations + (start.evaluations if start is not None else 0))


def _best(drawn: Sequence[Drops], stages: Sequence[Stage], base: Drops) -> Drops:
    """The one that survives all stages."""
    if not drawn:
        raise InputError("no solution was found at random; use another choice")
    left = list(drawn)
    for stage in stages:
        values = {drops: stage.memo.at(drops, base) for drops in left}
        left = sorted(left, key=lambda drops: (values[drops], sorted(drops)))[: stage.survivors]
    return left[0]


def _around(problem: Problem, parent: Drops, count: int, seen: set[Drops], draw: random.Random) -> list[Drops]:
    """Solutions never seen before, a mutation away from the parent; fewer where there are hardly any more of them."""
    found: list[Drops] = []
    for _ in range(_TRIES * count):
        if len(found) == count:
            break
        switches = min(draw.randint(1, 3), draw.randint(1, 3), len(parent))
        back = draw.sample(sorted(parent), switches)
        mutant = _completed(problem, parent - set(back), set(back), draw)
        if mutant is not None and mutant not in seen:
            seen.add(mutant)
            found.append(mutant)
    return found


def _completed(problem: Problem, drops: Drops, barred: Set[Address], draw: random.Random) -> Drops | None:
    """A solution with these drops and others at random, none of them ``barred``; None if chance leads nowhere."""
    path = Path(problem, drops)
    while not path.met:
        left = [unit for unit in sorted(path.open()) if unit not in barred]
        if not left:
            return None
        path.step([draw.choice(left)])
    while spare := path.spare():
        path.step(restored=[draw.choice(spare)])
    return path.drops


def _single(drops: Drops, problem: Problem) -> Drops:
    """The same drops in units that are candidates: a block as its sublayers, where these are what may be dropped."""
    parts = {unit: [c for c in problem.candidates if c.parent == unit] for unit in drops - set(problem.candidates)}
    return drops - parts.keys() | {part for inside in parts.values() for part in inside}
