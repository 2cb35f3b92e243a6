"""Narrower without looking: what every choice of inner units has to beat."""

from __future__ import annotations

import torch

from billhook.measure.cost import Costs
from billhook.plan.plan import Keep
from billhook.search.width import Space, WidthProblem, allocate


def random_widths(problem: WidthProblem, seed: int = 0) -> tuple[tuple[Keep, ...], Costs]:
    """All sublayers lose the same share of their units, at random."""
    generator = torch.Generator().manual_seed(seed)
    chances = {s.address: torch.rand(s.count, generator=generator, dtype=torch.float64) for s in problem.spaces}
    return allocate(problem, chances, "uniform")


def even_widths(problem: WidthProblem) -> tuple[tuple[Keep, ...], Costs]:
    """All sublayers lose the same share of their units, and those that stay lie at equal distances: n of N are those
    numbered floor((i + 1/2) N / n), in each of the runs of which equally many must stay."""
    alike = {s.address: torch.zeros(s.count, dtype=torch.float64) for s in problem.spaces}
    keeps, costs = allocate(problem, alike, "uniform")
    spaces = {s.address: s for s in problem.spaces}
    return tuple(k.model_copy(update={"indices": _even(spaces[k.unit], len(k.indices))}) for k in keeps), costs


def _even(space: Space, left: int) -> tuple[int, ...]:
    run, each = space.count // space.parts, left // space.parts
    return tuple(p * run + (2 * i + 1) * run // (2 * each) for p in range(space.parts) for i in range(each))
