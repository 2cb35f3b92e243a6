"""Searches without a budget, on objectives whose cliff is known."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

import pytest
from outlines import outline
from synthetic import Synthetic, problem

from billhook.plan.address import Address
from billhook.plan.budget import Budget
from billhook.plan.check import check
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.search import Memo, greedy_until_cliff, pose, ranked_until_cliff
from billhook.search.cliff import cliff

BLOCKS = 8


class Cliff(Synthetic):
    """The attentions of ``free`` blocks cost next to nothing; any other unit costs ``dear`` for its size."""

    def __init__(self, free: Iterable[int], dear: float = 0.5, **fields: float) -> None:
        super().__init__(BLOCKS, **fields)
        self.free, self.dear = frozenset(free), dear

    def weight(self, unit: Address) -> float:
        small = unit.sublayer == "attention" and unit.block in self.free
        return super().weight(unit) * (0.002 if small else self.dear)


def attentions(blocks: Iterable[int]) -> set[Address]:
    return {Address("decoder", block, "attention") for block in blocks}


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("free", [{1, 2, 5, 6}, {0, 3, 4, 5, 6, 7}])
def test_greedy_stops_before_the_step_that_is_out_of_proportion(free: set[int], lazy: bool) -> None:
    posed = problem(BLOCKS, "until=cliff")
    found = greedy_until_cliff(posed, Memo(Cliff(free)), lazy=lazy)
    check(Plan.of(found.drops), posed.outline)
    assert found.drops == attentions(free)
    assert cliff(found.steps) == len(free) == len(found.steps) - 1, "the step over it is on record, and the last"
    assert greedy_until_cliff(posed, Memo(Cliff(free)), lazy=lazy) == found


def test_the_search_looks_no_further_than_over_the_cliff() -> None:
    lazily = Cliff({1, 2, 5, 6})
    greedy_until_cliff(problem(BLOCKS, "until=cliff"), Memo(lazily))
    assert len(lazily.asked) < 40
    assert max(len(drops) for drops in lazily.asked) == 5


@pytest.mark.parametrize("unit", ["sublayer", "attention"])
def test_a_ranking_is_followed_to_the_cliff_of_the_objective(unit: str) -> None:
    posed = problem(BLOCKS, "until=cliff", unit)
    objective = Cliff({1, 2, 5, 6})
    scores = {u: objective.weight(u) for u in posed.candidates}
    found = ranked_until_cliff(posed, scores, Memo(objective), work=1000)
    assert found.drops == attentions({1, 2, 5, 6})
    assert cliff(found.steps) == 4 == len(found.steps) - 1
    assert found.evaluations == 6, "the dense model and one a step"
    assert found.steps[0].work > 1000
    rises = [after.objective - before.objective for before, after in pairwise(found.steps)]
    assert [step.score for step in found.steps] == pytest.approx([found.steps[0].objective, *rises]), "dense is 0"


def test_a_bad_ranking_falls_off_early() -> None:
    posed = problem(BLOCKS, "until=cliff", "attention")
    order = [1, 2, 5, 0, 6]
    scores = {u: float(order.index(u.block)) if u.block in order else 9.0 for u in posed.candidates}
    found = ranked_until_cliff(posed, scores, Memo(Cliff({1, 2, 5, 6})))
    assert found.drops == attentions({1, 2, 5})


@pytest.mark.parametrize("seed", range(4))
def test_a_model_that_gets_worse_evenly_is_refused(seed: int) -> None:
    posed = problem(BLOCKS, "until=cliff", "block")
    objective = Synthetic(BLOCKS, seed, pairs=0.1)
    message = "of the 7 possible steps none after the first 3 costs out of proportion to those before it, so there is"
    with pytest.raises(InputError, match=message):
        greedy_until_cliff(posed, Memo(objective))
    with pytest.raises(InputError, match=message):
        ranked_until_cliff(posed, {u: objective.weight(u) for u in posed.candidates}, Memo(objective))


def test_a_model_that_breaks_has_its_cliff_there() -> None:
    class Broken(Cliff):
        def figure(self, drops: Iterable[Address]) -> float:
            return super().figure(drops) if set(drops) <= attentions(self.free) else math.inf

    posed = problem(BLOCKS, "until=cliff")
    found = greedy_until_cliff(posed, Memo(Broken({1, 2, 5, 6})))
    assert found.drops == attentions({1, 2, 5, 6})
    ranking = {u: Cliff({1, 2, 5, 6}).weight(u) for u in posed.candidates}
    assert ranked_until_cliff(posed, ranking, Memo(Broken({1, 2, 5, 6}))).drops == found.drops
    with pytest.raises(InputError, match="the first step breaks the model already, so nothing may go"):
        greedy_until_cliff(posed, Memo(Broken(set())))


@pytest.mark.parametrize("at", range(7))
def test_a_ranking_ends_before_the_step_that_breaks_the_model(at: int) -> None:
    class Broken(Synthetic):
        def weight(self, unit: Address) -> float:
            return 1.0

        def figure(self, drops: Iterable[Address]) -> float:
            return super().figure(drops) if len(set(drops)) <= at else math.inf

    posed = problem(BLOCKS, "until=cliff", "attention")
    scores = {unit: float(unit.block) for unit in posed.candidates}
    if at == 0:
        with pytest.raises(InputError, match="the first step breaks the model already, so nothing may go"):
            ranked_until_cliff(posed, scores, Memo(Broken(BLOCKS)))
        return
    found = ranked_until_cliff(posed, scores, Memo(Broken(BLOCKS)))
    assert found.drops == attentions(range(at))
    assert len(found.steps) == at and found.evaluations == at + 2, "what breaks it is not on record"


def test_where_nothing_may_go_alone_there_is_nothing_to_search() -> None:
    with pytest.raises(InputError, match="no block of this paper model may go"):
        pose(outline(1), Budget.parse("until=cliff"), "block")


def test_progress_ends_at_its_total() -> None:
    heard: list[tuple[str, int, int]] = []
    greedy_until_cliff(
        problem(BLOCKS, "until=cliff"), Memo(Cliff({1, 2, 5})), progress=lambda *call: heard.append(call)
    )
    ends = {label: (done, total) for label, done, total in heard}
    assert ends["search"] == (1000, 1000)
