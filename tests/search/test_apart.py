"""Experts that stay, taken apart as far as the budget asks."""

from __future__ import annotations

import pytest
from families import build

from billhook.anatomy import discover
from billhook.measure.cost import CostModel
from billhook.plan.budget import Budget
from billhook.plan.check import check
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.target import Target
from billhook.search.apart import apart, eased
from billhook.search.blind_widths import even_widths
from billhook.search.width import pose_width


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_half_goes_by_merging_and_the_rest_by_the_largest_rank_that_will_do(name: str) -> None:
    outline = discover(build(name)).outline
    problem = pose_width(outline, Budget.parse("params=0.7"), "expert", Target.REMOTE, stack="decoder")
    costs = CostModel(outline)
    half = eased(problem, 0.5)
    assert half.ceilings["params"] == pytest.approx(0.85 * costs.dense["params"])
    keeps, merged = even_widths(half)
    edits, realised = apart(problem, keeps)
    plan = Plan.of([], Target.REMOTE, keeps)
    check(plan.model_copy(update={"edits": (*plan.edits, *edits)}), outline)
    assert {edit.unit for edit in edits} == {keep.unit for keep in keeps} and len({edit.rank for edit in edits}) == 1
    assert half.met(merged) and not problem.met(merged) and problem.met(realised)
    assert realised == costs.of((), keeps, factors=edits)
    wider = [edit.model_copy(update={"rank": edit.rank + 1}) for edit in edits]
    assert not problem.met(costs.of((), keeps, factors=wider))


def test_where_it_needs_no_ranks_and_where_none_will_do() -> None:
    outline = discover(build("mixtral")).outline
    problem = pose_width(outline, Budget.parse("params=0.7"), "expert", Target.REMOTE, stack="decoder")
    keeps, costs = even_widths(problem)
    assert apart(problem, keeps) == ((), pytest.approx(costs))
    with pytest.raises(InputError, match="not even with the experts that stay at rank 1"):
        apart(problem, keeps[:1])
