"""The units whose scores add up to least: an integer programme, solved exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from billhook.plan.address import Address
from billhook.plan.check import unsound
from billhook.plan.errors import InputError
from billhook.search.one_shot import check_scores
from billhook.search.path import Found, Path
from billhook.search.problem import Problem

_SCALE = 1e3  # of the largest score: the solver stops at an absolute gap of 1e-6
_INFEASIBLE = 2


def knapsack(problem: Problem, scores: Mapping[Address, float], *, work: int = 0) -> Found:
    """The units with the least sum of scores among all sets that meet the budget, dropped in one step.

    Source: LAPTOP-Diff (arXiv 2404.11098), which finds that the changes of the output by single layers add up, and
    minimises their sum at a given number of parameters. Here every limit of the budget counts.

    ``scores``: high is important; a unit without a score is unknown and stays, one of infinite score too. A score below
    0 counts as 0: the budget says how much goes, not how much could. Units of score 0 that the budget does not need
    come back. Of several optima it is the solver's first, the same on every run. ``work`` is what the scores cost.

    Exact to 1e-9 of the largest score: the solver closes the gap (its default leaves 1e-4). The result is checked
    against the budget and against what no model survives; what a tolerance of the solver let through is excluded, with
    all that drops less, and solved again. One cost is not additive: ``blocks`` where sublayers are dropped. A set that
    meets it only because all sublayers of a block go is not found. Raises InputError for a NaN score, or where no set
    meets the budget.
    """
    check_scores(scores)
    units = [u for u in problem.candidates if u in scores and math.isfinite(scores[u])]
    costs = np.array([max(scores[unit], 0.0) for unit in units])
    costs *= _SCALE / (costs.max(initial=0.0) or 1.0)
    savings = [problem.costs.saving(unit) for unit in units]
    rows, least = [], []
    for kind, ceiling in problem.ceilings.items():
        needed = problem.costs.dense[kind] - ceiling
        rows.append([saving[kind] / needed for saving in savings])
        least.append(1.0)
    for attentions, all_of_them in _attentions(problem, units):
        if sum(attentions) == all_of_them:  # one has to stay
            rows.append([-float(is_one) for is_one in attentions])
            least.append(1.0 - all_of_them)
    while True:
        chosen = _least(costs, rows, least) if units else None
        if chosen is None:
            raise InputError(f"budget {problem.budget} cannot be met with the {len(units)} units that have a score")
        drops = frozenset(unit for unit, goes in zip(units, chosen, strict=True) if goes)
        met = problem.met(problem.costs.of(drops))
        if met and unsound(drops, problem.outline) is None:
            path = Path(problem)
            path.step(drops, score=sum(scores[unit] for unit in sorted(drops)), work=work)
            path.trim(scores.__getitem__, work=work)
            return path.found(work)
        if met:  # another set, whichever
            rows.append([-1.0 if goes else 1.0 for goes in chosen])
            least.append(1.0 - sum(chosen))
        else:  # what is contained in it saves no more
            rows.append([0.0 if goes else 1.0 for goes in chosen])
            least.append(1.0)


def _least(costs: np.ndarray, rows: Sequence[Sequence[float]], least: Sequence[float]) -> list[bool] | None:
    """The 0/1 vector of least cost whose product with each row is at least so much; None if there is none."""
    constraints = LinearConstraint(np.array(rows), lb=np.array(least))
    result = milp(
        costs, integrality=np.ones(len(costs)), bounds=Bounds(0, 1), constraints=constraints, options={"mip_rel_gap": 0}
    )
    if result.status == _INFEASIBLE:
        return None
    if not result.success:
        raise RuntimeError(f"the integer programme was not solved: {result.message}")
    return [bool(x > 0.5) for x in result.x]


def _attentions(problem: Problem, units: Sequence[Address]) -> list[tuple[list[bool], int]]:
    """For each causal stack: which of the units take an attention with them, and how many attentions there are."""
    found = []
    for stack in problem.outline.stacks:
        holders = {i for i, block in enumerate(stack.blocks) if "attention" in block.sublayers}
        if stack.causal:
            takes = [u.stack == stack.name and u.sublayer in (None, "attention") and u.block in holders for u in units]
            found.append((takes, len(holders)))
    return found
