"""The coarse stage before a narrowing: whole blocks that go first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from billhook.measure.cost import CostModel
from billhook.plan.address import Address
from billhook.plan.budget import realised, within
from billhook.plan.check import units, unsound
from billhook.plan.record import Step
from billhook.search.one_shot import check_scores
from billhook.search.width import WidthProblem


def coarse(
    problem: WidthProblem, scores: Mapping[Address, float], share: float, work: int
) -> tuple[tuple[Step, ...], WidthProblem]:
    """The blocks of least score go one after the other, as long as all that went saves no more than ``share`` of what
    the budget asks to save (of each limit); a step for each of them, and the problem that is left for their inner
    units.

    High is important; ties break by address; a block without a score is unknown and stays. ``work`` is what the scores
    cost. Since no limit is reached here, the narrowing ends where it would end without this stage: one batch of units
    below the budget. Raises InputError for a NaN score.
    """
    check_scores(scores)
    outline, costs = problem.outline, CostModel(problem.outline)
    stacks = {space.address.stack for space in problem.spaces}
    floors = {k: problem.dense[k] - share * (problem.dense[k] - ceiling) for k, ceiling in problem.ceilings.items()}
    droppable = [unit for unit in units(outline, "block") if unit in scores and unit.stack in stacks]
    drops: frozenset[Address] = frozenset()
    left, steps = problem.start, []
    for unit in sorted(droppable, key=lambda unit: (scores[unit], unit)):
        after = costs.of(drops | {unit})
        if unsound(drops | {unit}, outline) is not None:
            continue
        if not all(within(floor, after[kind]) for kind, floor in floors.items()):
            break
        drops, left = drops | {unit}, after
        shares = realised(after, problem.dense)
        steps.append(Step(units=(str(unit),), score=scores[unit], objective=None, realised=shares, work=work))
    spaces = tuple(space for space in problem.spaces if space.address.parent not in drops)
    return tuple(steps), replace(problem, start=left, spaces=spaces)
