"""The step that every greedy search repeats."""

from __future__ import annotations

import math
from collections.abc import Callable

from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.search.ledger import Memo
from billhook.search.objective import Progress
from billhook.search.one_shot import Per
from billhook.search.path import Path


def descend(
    path: Path,
    memo: Memo[Address],
    rises: dict[Address, float],
    *,
    lazy: bool = True,
    per: Per = "budget",
    barred: Address | None = None,
    below: float = math.inf,
    until: Callable[[], bool] | None = None,
    progress: Progress | None = None,
) -> None:
    """Drop units until the budget is met, each time the one with the lowest rise of the objective for its gain.

    ``rises`` holds the last measured rise of each unit and is kept up to date; units not in it are measured first.
    ``barred`` is not dropped. The descent is given up, with the budget not met, once no way on can stay ``below`` that
    figure if rises do not fall and every further unit costs at least what the cheapest does for its gain. With
    ``until`` it also ends, and nothing is wrong, where this is true after a step or where no unit is left that would
    not break the model.
    """
    total = len(path.problem.candidates)
    unseen = any(unit not in rises for unit in path.problem.candidates)
    while not path.met and not (until is not None and until()):
        now = memo.at(path.drops)
        gains = path.open(barred)
        if not gains and (below < math.inf or until is not None):
            return
        if not gains:
            raise InputError(f"budget {path.problem.budget} cannot be met: no unit that may still go brings it nearer")
        missing = path.problem.missing(path.costs)
        fresh: set[Address] = set()
        if not lazy:
            rises.clear()
        while True:
            rates = {u: rises.get(u, -math.inf) / (gain if per == "budget" else 1.0) for u, gain in gains.items()}
            unit = min(gains, key=lambda u: (rates[u], u))
            if below < math.inf and now + rates[unit] * missing >= below:
                return
            if unit in fresh:
                break
            rises[unit] = memo.at(path.drops | {unit}, path.drops) - now
            fresh.add(unit)
            if progress is not None and unseen and not path.drops:
                progress("every unit once", len(fresh), total)
        if rises[unit] == math.inf and until is not None:
            return
        if rises[unit] == math.inf:
            raise InputError(f"budget {path.problem.budget} is too small: every unit that may go now breaks the model")
        path.step([unit], score=rises[unit], objective=memo.at(path.drops | {unit}, path.drops), work=memo.work)
        if progress is not None:
            progress("search", round(1000 * path.progress), 1000)


def put_back(path: Path, memo: Memo[Address]) -> None:
    """Restore what the budget does not need, each time the unit whose return lowers the objective most."""
    while spare := path.spare():
        left = {unit: memo.at(path.drops - {unit}) for unit in spare}
        unit = min(left, key=lambda u: (left[u], u))
        if left[unit] > memo.at(path.drops):
            return
        path.step(restored=[unit], objective=left[unit], work=memo.work)
