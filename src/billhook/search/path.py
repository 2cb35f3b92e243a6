"""The way from the dense model to one that keeps the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from billhook.plan.address import Address
from billhook.plan.budget import realised
from billhook.plan.check import normalise, unsound
from billhook.plan.record import Step
from billhook.search.objective import Drops
from billhook.search.problem import Problem


@dataclass(frozen=True)
class Found:
    """What a search came to. ``work`` counts block-token forwards, ``evaluations`` those of the objective."""

    drops: Drops
    steps: tuple[Step, ...]
    work: int
    evaluations: int


class Path:
    """A state of a search, with the steps that led to it."""

    def __init__(self, problem: Problem, drops: Iterable[Address] = (), steps: Iterable[Step] = ()) -> None:
        self.problem = problem
        self.drops: Drops = frozenset(drops)
        self.costs = problem.costs.of(self.drops)
        self.steps = list(steps)

    @property
    def met(self) -> bool:
        return self.problem.met(self.costs)

    @property
    def progress(self) -> float:
        """How far the budget is reached, from 0 to 1: the mean over its limits."""
        return 1 - self.problem.missing(self.costs) / len(self.problem.ceilings)

    def open(self, barred: Address | None = None) -> dict[Address, float]:
        """The units that may be dropped next and bring the budget nearer, with their gain; not ``barred``."""
        gains = {u: self.problem.gain(u, self.drops, self.costs) for u in self._sound() if u != barred}
        return {unit: gain for unit, gain in gains.items() if gain > 0}

    def spare(self) -> list[Address]:
        """Dropped units that could come back one at a time without breaking the budget."""
        return [u for u in sorted(self.drops) if self.problem.met(self.problem.costs.of(self.drops - {u}))]

    def step(
        self,
        dropped: Iterable[Address] = (),
        restored: Iterable[Address] = (),
        *,
        score: float | None = None,
        objective: float | None = None,
        work: int = 0,
    ) -> None:
        """Go one step: drop and restore units; ``score``, ``objective`` and ``work`` are for the record."""
        dropped, restored = sorted(dropped), sorted(restored)
        self.drops = self.drops - set(restored) | set(dropped)
        self.costs = self.problem.costs.of(self.drops)
        self.steps.append(
            Step(
                units=tuple(map(str, dropped)),
                restored=tuple(map(str, restored)),
                score=score,
                objective=objective,
                realised=realised(self.costs, self.problem.costs.dense),
                work=work,
            )
        )

    def trim(self, importance: Callable[[Address], float], *, work: int = 0) -> None:
        """Put back what the budget does not need, most important units first."""
        while spare := self.spare():
            self.step(restored=[min(spare, key=lambda unit: (-importance(unit), unit))], work=work)

    def found(self, work: int = 0, evaluations: int = 0) -> Found:
        return Found(normalise(self.drops, self.problem.outline), tuple(self.steps), work, evaluations)

    def _sound(self) -> list[Address]:
        outline = self.problem.outline
        return [u for u in self.problem.candidates if u not in self.drops and not unsound(self.drops | {u}, outline)]
