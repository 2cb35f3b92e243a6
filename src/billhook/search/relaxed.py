"""What a search by gradients asks: a loss with a gate for each unit, and its slopes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.search.path import Path
from billhook.search.problem import Problem

Gated = Mapping[Address, float]


class Relaxed(Protocol):
    """A loss in which a unit is let through as far as its gate says: 1 whole, 0 not at all, 1 where none is given.

    ``text`` numbers the pieces of text that a figure is taken on, without end. ``work`` counts block-token forwards.
    """

    @property
    def work(self) -> int: ...

    def loss(self, gates: Gated, text: int) -> float: ...

    def slopes(self, gates: Gated, text: int) -> tuple[float, dict[Address, float]]:
        """The loss, and d loss / d gate of each candidate."""


def shares(problem: Problem) -> dict[Address, float]:
    """How far each candidate alone brings the dense model to the budget: 1 is all the way."""
    return {unit: gain / len(problem.ceilings) for unit, gain in Path(problem).open().items()}


def cheapest(problem: Problem, price: Mapping[Address, float], far: float = 1.0) -> Path:
    """Drop the units of lowest price until so much of the way to the budget is gone; all the way, and what the budget
    then does not need comes back, dearest first."""
    path = Path(problem)
    while not path.met and path.progress < far - 1e-9:
        left = [unit for unit in path.open() if unit in price]
        if not left:
            raise InputError(f"budget {problem.budget} cannot be met with the {len(price)} units that have a gate")
        path.step([min(left, key=lambda unit: (price[unit], unit))])
    path.trim(price.__getitem__)
    return path
