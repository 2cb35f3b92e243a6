import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from outlines import outline
from synthetic import Drops, Synthetic, problem

from billhook.plan.address import Address
from billhook.plan.budget import Budget
from billhook.search import Found, Memo, greedy, pose
from billhook.search.descend import put_back
from billhook.search.path import Path
from billhook.search.refine import refine as refined


def run(seed: int, refine: float) -> tuple[Found, float]:
    memo = Memo(Synthetic(10, seed, pairs=0.5))
    found = greedy(problem(10, "params=0.7"), memo, refine=refine)
    return found, found.steps[-1].objective or 0.0


@given(st.integers(0, 300))
@settings(max_examples=25, deadline=None)
def test_second_thoughts_never_end_higher(seed: int) -> None:
    before, after = run(seed, 0.0), run(seed, 1.0)
    assert after[1] <= before[1]
    assert after[0].steps[: len(before[0].steps)] == before[0].steps


def test_they_find_what_greedy_overlooked() -> None:
    for seed in (5, 14, 18):
        assert run(seed, 1.0)[1] < run(seed, 0.0)[1]


@pytest.mark.parametrize("allowance", [0.05, 0.2, 0.5])
def test_the_allowance_is_kept_but_for_the_exchange_under_way(allowance: float) -> None:
    for seed in range(6):
        before, after = run(seed, 0.0)[0], run(seed, allowance)[0]
        assert after.work <= before.work * (1 + allowance) + 40


def test_no_exchange_where_nothing_interacts() -> None:
    """An additive objective and units of one size: greedy is optimal."""
    posed = problem(10, "blocks=6", "block")
    memo = Memo(Synthetic(10, 4))
    assert greedy(posed, memo, refine=5.0).drops == greedy(posed, Memo(Synthetic(10, 4))).drops


class Told(Synthetic):
    """The figures of some sets of drops are given; anything else costs its weight, attention little and an mlp more."""

    def __init__(self, weights: dict[Address, float], sets: dict[Drops, float] | None = None) -> None:
        super().__init__(4)
        self.weights, self.sets = weights, sets or {}

    def figure(self, drops: Drops) -> float:
        weights = (self.weights.get(u, 0.5 if u.sublayer == "attention" else 1.0) for u in drops)
        return self.sets.get(frozenset(drops), sum(weights))


@pytest.mark.parametrize(("alone", "comes_back"), [(1.0, True), (2.0, True), (3.0, False)])
def test_a_spare_unit_comes_back_unless_that_hurts(alone: float, comes_back: bool) -> None:
    posed = pose(outline(4), Budget.parse("params=0.8125"))  # 300 of 1600 have to go
    attention, mlp = Address("decoder", 0, "attention"), Address("decoder", 0, "mlp")
    path = Path(posed, {attention, mlp})
    put_back(path, Memo(Told({}, {frozenset({attention, mlp}): 2.0, frozenset({mlp}): alone})))
    assert path.drops == ({mlp} if comes_back else {attention, mlp})
    assert [(step.restored, step.objective) for step in path.steps] == [((str(attention),), alone)] * comes_back


@pytest.mark.parametrize(("early", "late"), [("attention", "mlp"), ("mlp", "attention")])
def test_the_unit_of_greatest_relief_is_tried_first(early: str, late: str) -> None:
    """The attention is the greater relief for what it takes from the budget. Exchanging either helps, and the work
    allows for one exchange."""
    posed = pose(outline(4), Budget.parse("params=0.75"))  # 400 of 1600 have to go
    units = {early: Address("decoder", 0, early), late: Address("decoder", 1, late)}
    objective = Told({units["attention"]: 2.0, units["mlp"]: 3.0})
    path = Path(posed, units.values())
    refined(path, Memo(objective), {}, work=12)
    assert [step.restored for step in path.steps] == [(str(units["attention"]),)]
    assert units["mlp"] in path.drops
