"""Rank once, drop from the bottom."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.search.path import Found, Path
from billhook.search.problem import Problem

Per = Literal["unit", "budget"]
"""What an importance is set against: each unit alike, or what it gains of the budget (for ``params``: a parameter)."""


def one_shot(problem: Problem, scores: Mapping[Address, float], *, per: Per = "unit", work: int = 0) -> Found:
    """Drop the least important units until the budget is met, then put back, most important first, what is not needed
    any more (a large last unit may make an earlier small one superfluous).

    ``scores``: high is important; a unit without a score is unknown and stays. Ties break by address. ``work`` is what
    the scores cost. Raises InputError for a NaN score, or where the scored units do not suffice.
    """
    path = Path(problem)
    rank = ranking(path, scores, per)
    while not path.met:
        unit = lowest(path, rank)
        if unit is None:
            raise InputError(f"budget {problem.budget} cannot be met with the {len(rank)} units that have a score")
        path.step([unit], score=scores[unit], work=work)
    path.trim(rank.__getitem__, work=work)
    return path.found(work)


def ranking(path: Path, scores: Mapping[Address, float], per: Per) -> dict[Address, float]:
    """What each unit that has a score and may go is ranked by. InputError for a NaN score."""
    check_scores(scores)
    gains = path.open()
    return {u: scores[u] / (gains[u] if per == "budget" else 1.0) for u in gains if u in scores}


def lowest(path: Path, rank: Mapping[Address, float]) -> Address | None:
    """The lowest of the ranked units that may still go and help, the first of equals; None if there is none."""
    left = [unit for unit in path.open() if unit in rank]
    return min(left, key=lambda unit: (rank[unit], unit), default=None)


def check_scores(scores: Mapping[Address, float]) -> None:
    """InputError for the first score that is NaN."""
    for unit, score in sorted(scores.items()):
        if math.isnan(score):
            raise InputError(f"the score of unit {unit} is NaN")
