"""Many small changes tried on little text, the best of them on more."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Generic

from billhook.plan.address import Address
from billhook.plan.budget import Budget
from billhook.plan.errors import InputError
from billhook.search.ledger import Memo
from billhook.search.objective import C, Drops, Progress
from billhook.search.path import Found, Path
from billhook.search.problem import Problem

_TRIES = 100  # mutants drawn for one that is new


@dataclass(frozen=True)
class Stage(Generic[C]):
    """Who is looked at on what: the objective, and how many of those looked at survive it."""

    memo: Memo[C]
    survivors: int


def evolve(
    problem: Problem,
    stages: Sequence[Stage[Address]],
    *,
    generations: int,
    offspring: int,
    patience: int,
    seed: int = 0,
    start: Found | None = None,
    progress: Progress | None = None,
) -> Found:
    """Evolutionary search over drops with one parent (see ``lineage``).

    A mutation switches levels, as in the paper: some units come back, as many others go; how many is the smaller of
    two draws from 1 to 3. Where units differ in size (the paper switches only within a kind), units go at random until
    the budget is met again, and what it then does not need comes back at random.

    Without a ``start`` the parent is the one of as many random solutions as there are offspring that survives all
    stages.
    """
    draw = random.Random(seed)
    mutate = partial(_mutant, problem, draw=draw)
    path = Path(problem)
    if start is None:
        dense: Drops = frozenset()
        first = _best(_around(mutate, dense, offspring, {dense}), stages, dense)
    else:
        first = _single(start.drops, problem)
        path = Path(problem, first, start.steps)
    paid = start.work if start is not None else 0
    for parent, value in lineage(
        first,
        stages,
        mutate,
        budget=problem.budget,
        generations=generations,
        offspring=offspring,
        patience=patience,
        progress=progress,
    ):
        if parent != path.drops:
            work = paid + sum(stage.memo.work for stage in stages)
            path.step(parent - path.drops, path.drops - parent, objective=value, work=work)
    evaluations = sum(stage.memo.evaluations for stage in stages)
    return path.found(
        paid + sum(stage.memo.work for stage in stages),
        evaluations + (start.evaluations if start is not None else 0),
    )


def lineage(
    first: frozenset[C],
    stages: Sequence[Stage[C]],
    mutate: Callable[[frozenset[C]], frozenset[C] | None],
    *,
    budget: Budget,
    generations: int,
    offspring: int,
    patience: int,
    progress: Progress | None = None,
) -> Iterator[tuple[frozenset[C], float]]:
    """The ``first`` parent and each better one after it, with their figures (EvoPress, Sieberling et al. 2024, section
    3 and algorithm 1): ``offspring`` mutants a generation; each stage looks at those that the one before let through,
    on more text; the last stage lets one through, which becomes the parent where it is better than the parent on the
    whole calibration. Ends after ``generations``, or after ``patience`` of them without a better parent. ``mutate``
    draws a solution within the budget, or None where chance led nowhere.

    The parent's own figure is always that of the last stage, so that a lucky one on little text is not kept.

    Cost: a generation evaluates ``offspring`` sets on the first stage, and the survivors of each stage on the next.
    Raises InputError where the first one breaks the model.
    """
    last = stages[-1].memo
    parent, value = first, last.at(first)
    if value == float("inf"):
        raise InputError(f"budget {budget} is too small: every solution that was tried breaks the model")
    yield parent, value
    seen, idle = {parent}, 0
    for generation in range(generations):
        if progress is not None:
            progress("generations", generation, generations)
        mutants = _around(mutate, parent, offspring, seen)
        if not mutants or idle == patience:
            break
        best = _best(mutants, stages, parent)
        idle += 1
        if last.at(best, parent) < value:
            parent, value, idle = best, last.at(best, parent), 0
            yield parent, value
    if progress is not None:
        progress("generations", generations, generations)


def _best(drawn: Sequence[frozenset[C]], stages: Sequence[Stage[C]], base: frozenset[C]) -> frozenset[C]:
    """The one that survives all stages."""
    if not drawn:
        raise InputError("no solution was found at random; use another choice")
    left = list(drawn)
    for stage in stages:
        values = {solution: stage.memo.at(solution, base) for solution in left}
        left = sorted(left, key=lambda solution: (values[solution], sorted(solution)))[: stage.survivors]
    return left[0]


def _around(
    mutate: Callable[[frozenset[C]], frozenset[C] | None], parent: frozenset[C], count: int, seen: set[frozenset[C]]
) -> list[frozenset[C]]:
    """Solutions never seen before, a mutation away from the parent; fewer where there are hardly any more of them."""
    found: list[frozenset[C]] = []
    for _ in range(_TRIES * count):
        if len(found) == count:
            break
        mutant = mutate(parent)
        if mutant is not None and mutant not in seen:
            seen.add(mutant)
            found.append(mutant)
    return found


def switches(draw: random.Random) -> int:
    """How many levels a mutation switches: the smaller of two draws from 1 to 3."""
    return min(draw.randint(1, 3), draw.randint(1, 3))


def _mutant(problem: Problem, parent: Drops, draw: random.Random) -> Drops | None:
    back = set(draw.sample(sorted(parent), min(switches(draw), len(parent))))
    return _completed(problem, parent - back, back, draw)


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
    return frozenset(drops - parts.keys() | {part for inside in parts.values() for part in inside})
