"""How far experts are taken apart, once others were merged into them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from billhook.measure.cost import CostModel, Costs
from billhook.plan.errors import InputError
from billhook.plan.plan import Factorise, Keep
from billhook.search.width import WidthProblem


def eased(problem: WidthProblem, share: float) -> WidthProblem:
    """The same problem with only a ``share`` of what has to go."""
    limits = problem.ceilings.items()
    return replace(problem, ceilings={k: problem.start[k] - share * (problem.start[k] - limit) for k, limit in limits})


def apart(problem: WidthProblem, keeps: Iterable[Keep]) -> tuple[tuple[Factorise, ...], Costs]:
    """The experts that stay of each mixture that has lost some, in two parts of the largest common rank with which the
    budget is met (see ``LowRankExperts``), or as they are where it is met without. InputError where none meets it."""
    keeps, costs = tuple(keeps), CostModel(problem.outline)
    sublayers = dict(problem.outline.sublayers())
    places = [(keep.unit, path, o) for keep in keeps for path, o in sublayers[keep.unit].mixtures.items() if o.useful]

    def at(rank: int) -> tuple[tuple[Factorise, ...], Costs]:
        edits = tuple(Factorise(unit=unit, linear=path, rank=min(rank, o.useful)) for unit, path, o in places)
        return edits, costs.of((), keeps, factors=edits)

    whole = costs.of((), keeps)
    if problem.met(whole):
        return (), whole
    low, high = 0, max((outline.useful for _, _, outline in places), default=0)
    if not high or not problem.met(at(1)[1]):
        raise InputError(f"budget {problem.budget} cannot be met: not even with the experts that stay at rank 1")
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if problem.met(at(middle)[1]) else (low, middle - 1)
    return at(low)
