"""What every method has to beat, and the contiguous span."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from billhook.plan.address import Address
from billhook.plan.check import unsound
from billhook.plan.errors import InputError
from billhook.search.one_shot import one_shot
from billhook.search.path import Found, Path
from billhook.search.problem import Problem


def at_random(problem: Problem, seed: int = 0) -> Found:
    """Units in random order."""
    shuffled = random.Random(seed).sample(problem.candidates, len(problem.candidates))
    return one_shot(problem, {unit: float(place) for place, unit in enumerate(shuffled)})


def first(problem: Problem) -> Found:
    """The units next to the input."""
    return one_shot(problem, {unit: float(place) for place, unit in enumerate(problem.candidates)})


def last(problem: Problem) -> Found:
    """The units next to the output."""
    return one_shot(problem, {unit: -float(place) for place, unit in enumerate(problem.candidates)})


def evenly_spaced(problem: Problem) -> Found:
    """As few units as the budget allows, at equal distances, as many left at either end as half of what is between:
    n of N candidates are those numbered floor((i + 1/2) N / n)."""
    total = len(problem.candidates)
    for count in range(1, total + 1):
        chosen = [problem.candidates[(2 * i + 1) * total // (2 * count)] for i in range(count)]
        if _solves(problem, chosen):
            path = Path(problem)
            path.step(chosen)
            return path.found()
    raise InputError(f"budget {problem.budget} cannot be met by units at equal distances")


def evenly_kept(problem: Problem) -> Found:
    """As few units as the budget allows, so that those that stay lie at equal distances from the first candidate to the
    last, which both stay: k of N candidates are those numbered i (N - 1) / (k - 1), rounded half up.

    Source: the Unified Layer Skipping of Liu et al. 2024 (arXiv 2404.06954). The authors' code turns the distance into
    a whole number first, which at a mild target leaves one run of skipped blocks near the end; here it stays exact.
    """
    total = len(problem.candidates)
    for kept in range(total - 1, 1, -1):
        stay = {(2 * i * (total - 1) + kept - 1) // (2 * (kept - 1)) for i in range(kept)}
        chosen = [unit for number, unit in enumerate(problem.candidates) if number not in stay]
        if _solves(problem, chosen):
            path = Path(problem)
            path.step(chosen)
            return path.found()
    raise InputError(f"budget {problem.budget} cannot be met if the first and the last unit stay")


def span(problem: Problem, angular: Mapping[str, Sequence[Sequence[float]]], *, work: int = 0) -> Found:
    """The run of adjacent blocks that turns the stream least (Gromov et al. 2024, "The Unreasonable Ineffectiveness of
    the Deeper Layers", section 3.2), as short as the budget allows.

    ``angular[stack][n - 1][i]`` is the distance between the inputs of block i and of block i + n; ties break by
    address. ``work`` is what the distances cost. Raises InputError for units that are no blocks.
    """
    if any(unit.sublayer is not None for unit in problem.candidates):
        raise InputError("a span consists of whole blocks; use unit block")
    longest = max(len(rows) for rows in angular.values())
    for length in range(1, longest + 1):
        spans = [
            (distance, [Address(stack, start + k) for k in range(length)])
            for stack, rows in sorted(angular.items())
            for start, distance in enumerate(rows[length - 1] if length <= len(rows) else ())
        ]
        solving = [pair for pair in spans if _solves(problem, pair[1])]
        if solving:
            distance, chosen = min(solving)
            path = Path(problem)
            path.step(chosen, score=distance, work=work)
            return path.found(work)
    raise InputError(f"budget {problem.budget} cannot be met by one span of adjacent blocks")


def _solves(problem: Problem, chosen: Sequence[Address]) -> bool:
    may_go = set(chosen) <= set(problem.candidates) and unsound(chosen, problem.outline) is None
    return may_go and problem.met(problem.costs.of(chosen))
