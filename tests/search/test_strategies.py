"""What holds for every strategy, whatever the objective."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from outlines import outline, stack
from synthetic import Synthetic, kept, largest, problem

from billhook.plan.address import Address
from billhook.plan.budget import Budget
from billhook.plan.check import check
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.search import (
    Found,
    Memo,
    Problem,
    at_random,
    evenly_kept,
    evenly_spaced,
    first,
    greedy,
    knapsack,
    last,
    one_shot,
    pose,
    span,
)
from billhook.search.one_shot import Per

Strategy = Callable[[Problem, Synthetic], Found]
STRATEGIES: dict[str, Strategy] = {
    "one shot": lambda p, o: one_shot(p, {u: o.weight(u) for u in p.candidates}),
    "one shot per budget": lambda p, o: one_shot(p, {u: o.weight(u) for u in p.candidates}, per="budget"),
    "knapsack": lambda p, o: knapsack(p, {u: o.weight(u) for u in p.candidates}),
    "lazy": lambda p, o: greedy(p, Memo(o)),
    "plain": lambda p, o: greedy(p, Memo(o), lazy=False),
    "lazy per unit": lambda p, o: greedy(p, Memo(o), per="unit"),
    "refined": lambda p, o: greedy(p, Memo(o), refine=0.5),
    "random": lambda p, o: at_random(p, o.seed),
    "first": lambda p, o: first(p),
    "last": lambda p, o: last(p),
}
cases = st.tuples(st.integers(4, 9), st.floats(0.35, 0.97), st.sampled_from(["block", "sublayer"]), st.integers(0, 99))


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@settings(max_examples=25, deadline=None)
@given(cases, st.sampled_from([0.0, 0.3]), st.sampled_from([0.0, 0.5]))
def test_the_budget_is_met_and_barely(
    strategy: Strategy, case: tuple[int, float, str, int], pairs: float, noise: float
) -> None:
    blocks, fraction, unit, seed = case
    posed = problem(blocks, f"params={fraction:.3f}", unit)
    found = strategy(posed, Synthetic(blocks, seed, pairs=pairs, noise=noise))
    check(Plan.of(found.drops), posed.outline)
    asked, realised = float(f"{fraction:.3f}"), kept(posed, found.drops)
    assert realised <= asked * (1 + 1e-9), "trap 7: what was asked for has gone"
    assert asked - realised < largest(posed), "trap 8: and less than a unit more"
    assert found.steps[-1].realised["params"] == pytest.approx(realised)
    again = strategy(posed, Synthetic(blocks, seed, pairs=pairs, noise=noise))
    assert again == found, "same inputs and seed, same plan, same steps, same work"


def test_several_limits_all_hold() -> None:
    posed = problem(10, "params=0.8,kv_bytes=0.6,flops=0.85")
    for name, strategy in STRATEGIES.items():
        found = strategy(posed, Synthetic(10, pairs=0.1))
        for kind, ceiling in (("params", 0.8), ("kv_bytes", 0.6), ("flops", 0.85)):
            assert kept(posed, found.drops, kind) <= ceiling, name


def test_on_an_additive_objective_lazy_plain_and_one_shot_agree_with_fewer_evaluations() -> None:
    posed = problem(12, "params=0.7", "block")
    objective = Synthetic(12)
    lazy, plain = greedy(posed, Memo(Synthetic(12))), greedy(posed, Memo(Synthetic(12)), lazy=False)
    ranked = one_shot(posed, {u: objective.weight(u) for u in posed.candidates}, per="budget")
    assert lazy.drops == plain.drops == ranked.drops
    count = len(lazy.drops)
    best = min(itertools.combinations(posed.candidates, count), key=lambda s: sum(map(objective.weight, s)))
    assert lazy.drops == frozenset(best)
    assert lazy.evaluations <= 12 + 2 * count
    assert plain.evaluations >= sum(12 - i for i in range(count))


@given(st.integers(0, 200))
@settings(max_examples=20, deadline=None)
def test_where_losses_add_up_worse_lazy_is_plain_at_a_fraction_of_the_work(seed: int) -> None:
    """Rises only grow as others go (a supermodular objective): an old one is a true lower bound."""
    posed = problem(20, "params=0.7")
    lazy = greedy(posed, Memo(lazily := Synthetic(20, seed, pairs=0.05)))
    plain = greedy(posed, Memo(plainly := Synthetic(20, seed, pairs=0.05)), lazy=False)
    assert lazy.drops == plain.drops
    assert len(lazily.asked) < len(plainly.asked) / 3
    assert lazy.work < plain.work / 3


def test_a_lucky_first_look_is_looked_at_again_before_it_decides() -> None:
    """An estimate from little text that is far too low drops nothing by itself."""
    posed = problem(8, "params=0.85", "block")
    objective = Synthetic(8)
    dearest = max(posed.candidates, key=objective.weight)
    estimates = {unit: objective.weight(unit) for unit in posed.candidates} | {dearest: -100.0}
    found = greedy(posed, Memo(objective), estimates=estimates)
    assert dearest not in found.drops
    assert found.drops == greedy(posed, Memo(Synthetic(8))).drops
    assert frozenset({dearest}) in objective.asked


def test_block_normalisation_of_scores() -> None:
    posed = problem(8, "params=0.9")
    # An mlp has three times the parameters: at twice the importance it is the better bargain.
    scores = {u: (2.0 if u.sublayer == "mlp" else 1.0) for u in posed.candidates}
    assert {u.sublayer for u in one_shot(posed, scores).drops} == {"attention"}
    assert "mlp" in {u.sublayer for u in one_shot(posed, scores, per="budget").drops}


def test_one_shot_puts_back_what_a_large_last_unit_makes_superfluous() -> None:
    posed = pose(outline(4), Budget.parse("params=0.8125"))  # 300 of 1600 have to go
    scores = {u: float(i) for i, u in enumerate(posed.candidates)}
    # decoder.0: attention (100), mlp (300): the attention is not needed any more
    found = one_shot(posed, scores)
    assert found.drops == {Address("decoder", 0, "mlp")}
    assert found.steps[-1].restored == ("decoder.0.attention",)


def test_of_those_that_could_come_back_the_most_important_one_does() -> None:
    posed = pose(outline(6), Budget.parse("params=0.84"))  # 384 of 2400 have to go
    first_ones = ["decoder.0.attention", "decoder.1.attention", "decoder.2.mlp"]  # 100, 100 and 300
    scores = {u: float(first_ones.index(str(u)) if str(u) in first_ones else 10) for u in posed.candidates}
    found = one_shot(posed, scores)
    assert found.steps[-1].restored == ("decoder.1.attention",)
    assert found.drops == {Address("decoder", 0, "attention"), Address("decoder", 2, "mlp")}


def test_unknown_units_stay_and_nan_is_refused() -> None:
    posed = problem(6, "params=0.8", "block")
    scores = dict.fromkeys(posed.candidates, 1.0)
    del scores[Address("decoder", 0)]
    assert Address("decoder", 0) not in one_shot(posed, scores).drops
    with pytest.raises(InputError, match="cannot be met with the 1 units that have a score"):
        one_shot(posed, {Address("decoder", 0): 1.0})
    with pytest.raises(InputError, match=r"the score of unit decoder\.3 is NaN"):
        one_shot(posed, scores | {Address("decoder", 3): float("nan")})


def test_ties_break_by_address() -> None:
    posed = problem(9, "blocks=6", "block")
    assert one_shot(posed, dict.fromkeys(reversed(posed.candidates), 1.0)).drops == first(posed).drops


def blocks_of(found: Found) -> list[int]:
    return sorted(unit.block for unit in found.drops)


def test_the_shape_of_the_baselines() -> None:
    posed = problem(12, "blocks=8", "block")
    assert blocks_of(first(posed)) == [0, 1, 2, 3]
    assert blocks_of(last(posed)) == [8, 9, 10, 11]
    assert blocks_of(evenly_spaced(posed)) == [1, 4, 7, 10]
    assert len(at_random(posed, 1).drops) == 4
    assert len({at_random(posed, seed).drops for seed in range(8)}) > 4


@given(st.integers(4, 30), st.floats(0.3, 0.95), st.sampled_from(["block", "sublayer"]))
@settings(max_examples=40, deadline=None)
def test_evenly_spaced_units_meet_the_budget(blocks: int, fraction: float, unit: str) -> None:
    posed = problem(blocks, f"params={fraction:.3f}", unit)
    found = evenly_spaced(posed)
    assert kept(posed, found.drops) <= float(f"{fraction:.3f}")
    if unit == "block":
        gaps = {b - a for a, b in itertools.pairwise(blocks_of(found))}
        assert max(gaps, default=0) - min(gaps, default=0) <= 1


@given(st.integers(4, 40), st.data())
@settings(max_examples=40, deadline=None)
def test_what_stays_is_evenly_spread_and_so_are_both_ends(blocks: int, data: st.DataObject) -> None:
    left = data.draw(st.integers(2, blocks - 1))
    found = evenly_kept(problem(blocks, f"blocks={left}", "block"))
    stays = sorted(set(range(blocks)) - set(blocks_of(found)))
    assert len(stays) == left, "no more goes than has to"
    assert (stays[0], stays[-1]) == (0, blocks - 1)
    gaps = {b - a for a, b in itertools.pairwise(stays)}
    assert max(gaps) - min(gaps) <= 1


def test_the_ends_are_not_skipped_for_any_budget() -> None:
    assert blocks_of(evenly_kept(problem(12, "blocks=8", "block"))) == [1, 4, 7, 10]
    assert blocks_of(evenly_kept(problem(12, "blocks=4", "block"))) == [1, 2, 3, 5, 6, 8, 9, 10]
    assert 0 in blocks_of(evenly_spaced(problem(12, "blocks=4", "block")))
    with pytest.raises(InputError, match="cannot be met if the first and the last unit stay"):
        evenly_kept(problem(5, "blocks=1", "block"))


def test_the_span_is_the_shortest_that_suffices_at_the_smallest_angle() -> None:
    posed = problem(6, "blocks=4", "block")
    angular = {"decoder": [[0.3, 0.1, 0.1, 0.2, 0.3, 0.4], [0.5, 0.3, 0.2, 0.2, 0.6], [0.0] * 4]}
    found = span(posed, angular)
    assert blocks_of(found) == [2, 3]
    assert found.steps[0].score == 0.2
    with pytest.raises(InputError, match="a span consists of whole blocks"):
        span(problem(6), angular)
    with pytest.raises(InputError, match="cannot be met by one span"):
        span(posed, {"decoder": angular["decoder"][:1]})


def test_a_span_stays_within_one_stack() -> None:
    both = outline(stack(4, "encoder", causal=False), 4)
    posed = pose(both, Budget.parse("params=0.75"), "block")
    found = span(posed, {"encoder": [[0.1] * 4, [0.2] * 3], "decoder": [[0.3] * 4, [0.1] * 3]})
    assert found.drops == {Address("decoder", 0), Address("decoder", 1)}


def test_a_model_that_breaks_is_an_error() -> None:
    class Broken(Synthetic):
        def figure(self, drops: object) -> float:
            return float("inf") if drops else 0.0

    with pytest.raises(InputError, match="every unit that may go now breaks the model"):
        greedy(problem(5), Memo(Broken(5)))


def test_progress_ends_at_its_total() -> None:
    heard: list[tuple[str, int, int]] = []
    greedy(problem(8), Memo(Synthetic(8)), refine=0.5, progress=lambda *call: heard.append(call))
    ends = {label: (done, total) for label, done, total in heard}
    assert all(done == total for done, total in ends.values())
    assert len(ends) == 3


@pytest.mark.parametrize("per", ["unit", "budget"])
def test_greedy_puts_back_what_a_later_unit_makes_superfluous(per: Per) -> None:
    class Early(Synthetic):
        def weight(self, unit: Address) -> float:
            return {"decoder.1.attention": 0.01, "decoder.2.mlp": 0.2}.get(str(unit), 9.0)

    found = greedy(problem(5, "params=0.86"), Memo(Early(5)), per=per)
    assert [step.units for step in found.steps] == [("decoder.1.attention",), ("decoder.2.mlp",), ()]
    assert found.steps[-1].restored == ("decoder.1.attention",)
    assert found.drops == {Address("decoder", 2, "mlp")}
