"""Objectives without a model, whose figures and work are known."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable

from outlines import block, outline, stack

from billhook.measure.cost import CostModel
from billhook.plan.address import Address
from billhook.plan.budget import Budget
from billhook.search.problem import Problem, pose

Drops = frozenset[Address]


class Synthetic:
    """The sum of a weight for each dropped unit and a penalty for each pair of them that is a neighbour of another.

    Work is counted as a replayed stack does: the blocks after the first change, a move to the set asked about last
    being free. ``asked`` and ``moves`` are what a test may want to know.
    """

    def __init__(
        self, blocks: int, seed: int = 0, *, pairs: float = 0.0, noise: float = 0.0, pause: float = 0.0
    ) -> None:
        self.blocks, self.pairs, self.noise, self.pause = blocks, pairs, noise, pause
        self.seed = seed
        self.work = blocks
        self.asked: list[Drops] = []
        self.moves = 0
        self._state: Drops = frozenset()
        self._last: Drops = frozenset()

    def weight(self, unit: Address) -> float:
        size = {None: 4.0, "attention": 1.0, "mlp": 3.0}[unit.sublayer]
        return size * random.Random(f"{self.seed} {unit}").uniform(0.2, 2.0)

    def figure(self, drops: Iterable[Address]) -> float:
        drops = sorted(drops)
        near = sum(self.pairs / (1 + abs(a.block - b.block)) for a in drops for b in drops if a < b)
        shake = random.Random(f"{self.seed} {[str(d) for d in drops]}").uniform(-self.noise, self.noise)
        return sum(map(self.weight, drops)) + near + shake

    def at(self, drops: Drops) -> float:
        self.work += self._after(drops)
        self._last = drops
        self.asked.append(drops)
        time.sleep(self.pause)
        return self.figure(drops)

    def move(self, drops: Drops) -> None:
        if drops != self._last:
            self.work += self._after(drops)
        self.moves += 1
        self._state = self._last = drops

    def _after(self, drops: Drops) -> int:
        return self.blocks - min((u.block for u in drops ^ self._state), default=self.blocks)


def problem(blocks: int, budget: str = "params=0.8", unit: str = "sublayer", **fields: object) -> Problem:
    """Blocks of slightly unequal sizes, about one to three between attention and MLP."""
    drawn = [block(100 + i % 3, 300 + i % 2) for i in range(blocks)]
    return pose(outline(stack(drawn)), Budget.parse(budget), unit, **fields)


def kept(problem: Problem, drops: Iterable[Address], kind: str = "params") -> float:
    """The realised fraction, counted anew."""
    costs = CostModel(problem.outline)
    return costs.of(drops)[kind] / costs.dense[kind]


def largest(problem: Problem, kind: str = "params") -> float:
    """The share of the largest candidate."""
    return max(problem.costs.saving(u)[kind] for u in problem.candidates) / problem.costs.dense[kind]
