"""Widths by evolution: sublayers give each other a level of their width, as long as the output gets nearer to dense."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from billhook.measure.cost import Costs
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Keep
from billhook.search.evolve import Stage, lineage, switches
from billhook.search.objective import Progress
from billhook.search.width import Space, WidthProblem, allocate, gain_of, keep_of, less, order_of, steps_known

LEVELS = 16  # of the largest sublayer, from all of it to nothing


@dataclass(frozen=True, order=True)
class Narrowed:
    """A sublayer with so many units left."""

    address: Address
    left: int

    def __str__(self) -> str:
        return f"{self.address} {self.left}"


Widths = frozenset[Narrowed]


def evolve_widths(
    problem: WidthProblem,
    scores: Mapping[Address, Tensor],
    stages: Sequence[Stage[Narrowed]],
    *,
    generations: int,
    offspring: int,
    patience: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[tuple[Keep, ...], float]:
    """What is kept of each sublayer after an evolutionary search over their widths (see ``search.evolve.lineage``), and
    the figure of that. It begins with all sublayers narrowed by the same share, as the paper does.

    A mutation switches levels: one to three times a sublayer that is narrower gets a level back, then others, at
    random, go down a level each until the budget is met, and what it then does not need comes back, to those that went
    down last first: the budget is met within the smallest unit that may come back. A level gains the same of the budget
    everywhere: a sixteenth of the largest sublayer, or one step where steps are larger (a KV group). The paper's levels
    are equal numbers of weights as well, where sublayers are of one kind and levels stored, 8 of them on either side of
    the start; here a level is a distance, and every width that may be left can be reached. Within a sublayer the order
    is that of ``scores``, as in ``allocate``.

    Raises InputError where sublayers must be equally wide, and what ``allocate`` and ``lineage`` raise.
    """
    if problem.level:
        raise InputError("an ordinary checkpoint has equal widths: evolution makes them differ; use target remote")
    grid = Grid.of(problem, scores)
    keeps, _ = allocate(problem, scores, "uniform")
    first = frozenset(Narrowed(keep.unit, len(keep.indices)) for keep in keeps)
    mutate = partial(mutant, grid, draw=random.Random(seed))
    *_, (best, value) = lineage(
        first,
        stages,
        mutate,
        budget=problem.budget,
        generations=generations,
        offspring=offspring,
        patience=patience,
        progress=progress,
    )
    return keeps_of(problem, scores, best), value


def keeps_of(problem: WidthProblem, scores: Mapping[Address, Tensor], widths: Iterable[Narrowed]) -> tuple[Keep, ...]:
    """The edits that leave these widths: of each sublayer the most important units."""
    left = {narrowed.address: narrowed.left for narrowed in widths}
    spaces = [space for space in problem.spaces if space.address in left]
    return tuple(keep_of(s, order_of(scores[s.address], s.parts), left[s.address]) for s in spaces)


@dataclass(frozen=True)
class Grid:
    """What widths a search may try: of each of ``spaces`` the steps from 0 to ``ends``, and how many units a level
    ``takes``."""

    problem: WidthProblem
    spaces: tuple[Space, ...]
    ends: tuple[int, ...]
    takes: tuple[int, ...]

    @classmethod
    def of(cls, problem: WidthProblem, scores: Mapping[Address, Tensor]) -> Grid:
        """Those sublayers that have scores, as far as the scores are known."""
        spaces = tuple(space for space in problem.spaces if space.address in scores)
        gains = [gain_of(problem, space) for space in spaces]
        level = max(space.count * gain for space, gain in zip(spaces, gains, strict=True)) / LEVELS
        takes = tuple(min(max(round(level / gain), 1), space.count) for space, gain in zip(spaces, gains, strict=True))
        return cls(problem, spaces, tuple(steps_known(space, scores[space.address]) for space in spaces), takes)

    def moved(self, number: int, step: int, down: bool) -> int:
        """The step of a sublayer a level further ``down`` or up, at least the next one, at most the last."""
        left, takes = self.spaces[number].left, self.takes[number]
        aim = left[step] + (-takes if down else takes)
        nearest = min(range(self.ends[number] + 1), key=lambda s: abs(left[s] - aim))
        return min(max(nearest, step + 1), self.ends[number]) if down else max(min(nearest, step - 1), 0)


def mutant(grid: Grid, parent: Widths, draw: random.Random) -> Widths | None:
    """Widths a mutation away from the parent's, within the budget; None if chance leads nowhere."""
    left = {narrowed.address: narrowed.left for narrowed in parent}
    steps = [space.left.index(left.get(space.address, space.count)) for space in grid.spaces]
    everyone = range(len(steps))
    raised: set[int] = set()
    for _ in range(switches(draw)):
        if narrow := [n for n in everyone if steps[n]]:
            number = draw.choice(narrow)
            steps[number] = grid.moved(number, steps[number], down=False)
            raised.add(number)
    lost: list[int] = []
    while not grid.problem.met(_costs(grid, steps)):
        wide = [n for n in everyone if n not in raised and steps[n] < grid.ends[n]]
        if not wide:
            return None
        lost.append(draw.choice(wide))
        steps[lost[-1]] = grid.moved(lost[-1], steps[lost[-1]], down=True)
    for number in [*reversed(lost), *draw.sample(everyone, len(steps))]:
        others = _costs(grid, [*steps[:number], 0, *steps[number + 1 :]])
        steps[number] = _least(grid, number, others, steps[number])
    pairs = zip(grid.spaces, steps, strict=True)
    return frozenset(Narrowed(space.address, space.left[step]) for space, step in pairs if step)


def _costs(grid: Grid, steps: Sequence[int]) -> Costs:
    gone = [(space, space.count - space.left[step]) for space, step in zip(grid.spaces, steps, strict=True)]
    return less(grid.problem.start, gone)


def _least(grid: Grid, number: int, others: Costs, most: int) -> int:
    """The first step of a sublayer at which the budget is met, the others staying as they are: ``most`` or before."""
    space = grid.spaces[number]
    return bisect_left(
        range(most), True, key=lambda step: grid.problem.met(less(others, [(space, space.count - space.left[step])]))
    )
