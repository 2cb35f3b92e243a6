"""Paths with and without a cliff, drawn by hand."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from billhook.plan.record import Step
from billhook.search.cliff import cliff


def path(rates: list[float], freed: list[float] | float = 0.01, start: float = 3.0) -> list[Step]:
    """Steps that raise the objective at these rates (for the whole of the parameters), each freeing a share of them."""
    shares = freed if isinstance(freed, list) else [freed] * len(rates)
    steps, objective, kept = [], start, 1.0
    for rate, share in zip(rates, shares, strict=True):
        objective, kept = objective + rate * share, kept - share
        steps.append(
            Step(units=("decoder.0",), score=rate * share, objective=objective, realised={"params": kept}, work=0)
        )
    return steps


def test_flat_and_then_ruinous() -> None:
    assert cliff(path([0.1] * 8 + [40.0, 60.0])) == 8
    assert cliff(path([5.0] * 8 + [40.0])) == 8
    assert cliff(path([2.0, 2.1, 1.9, 2.4, 2.6, 30.0, 3.0])) == 5


def test_what_is_usual_is_the_median_of_the_steps_before() -> None:
    """Growths of 1, 2, 4 and then 7: the usual one is 2 without the last, and would be 3 with it."""
    assert cliff(path([1.0, 1.0, 2.0, 8.0, 56.0])) == 4
    assert cliff(path([1.0, 1.0, 2.0, 8.0, 47.0])) is None


def test_where_it_begins_does_not_matter() -> None:
    assert cliff(path([2.0, 2.2, 2.0, 2.5, 30.0], start=1e6)) == 4


def test_back_to_what_a_step_cost_before_is_no_cliff_however_cheap_the_last_ones_were() -> None:
    assert cliff(path([8.0, 4.0, 2.0, 1.0, 7.0, 8.0])) is None
    assert cliff(path([8.0, 4.0, 2.0, 1.0, 25.0])) == 4


def test_nothing_is_known_from_too_few_steps() -> None:
    assert cliff([]) is None
    assert cliff(path([1.0])) is None
    assert cliff(path([1.0, 1.0, 50.0])) is None
    assert cliff(path([1.0, 1.0, 1.0, 50.0])) == 3


@given(st.floats(0.01, 30), st.floats(1.0, 2.5), st.integers(1, 40), st.integers(0, 99))
def test_growth_by_a_constant_factor_is_no_cliff(first: float, factor: float, length: int, seed: int) -> None:
    """However steep it gets in the end, with shares freed that differ threefold and a tenth of noise."""
    draw = random.Random(seed)
    rates = [first * factor**i * draw.uniform(0.95, 1.05) for i in range(length)]
    assert cliff(path(rates, [draw.uniform(0.003, 0.009) for _ in rates])) is None


@given(st.floats(0.5, 30), st.floats(2.5, 8), st.integers(1, 20))
def test_nor_is_steeper_growth_where_it_is_the_usual_one(first: float, factor: float, length: int) -> None:
    rates = [first * factor**i for i in range(length)]
    assert cliff(path(rates)) is None
    if length > 2:
        assert cliff(path([*rates, rates[-1] * factor * 3.5])) == length
        assert cliff(path([*rates, rates[-1] * factor * 2.5])) is None


@given(st.floats(0.5, 30), st.sampled_from([0.5, 1.0, 2.0, 3.0]), st.integers(1, 60))
def test_growth_by_a_power_is_no_cliff(first: float, power: float, length: int) -> None:
    assert cliff(path([first * (i + 3) ** power for i in range(length)])) is None


@given(
    st.floats(0.01, 30),
    st.floats(1.0, 1.8),
    st.integers(3, 40),
    st.floats(7, 100),
    st.integers(0, 99),
    st.integers(0, 9),
)
def test_a_jump_by_several_times_is_one_at_the_very_step(
    first: float, factor: float, at: int, jump: float, seed: int, more: int
) -> None:
    draw = random.Random(seed)
    before = [first * factor**i * draw.uniform(0.95, 1.05) for i in range(at)]
    height = max(*before, 1.0) * factor * jump
    rates = [*before, *(height * draw.uniform(1, 1.1) for _ in range(more + 1))]
    assert cliff(path(rates, [draw.uniform(0.003, 0.009) for _ in rates])) == at


@given(st.floats(1, 9), st.floats(0.1, 8), st.integers(3, 20))
def test_what_is_freed_counts_not_the_step(rate: float, start: float, at: int) -> None:
    """A step that costs ten times as much and frees ten times as much is in proportion; one that frees as little as
    the others is not."""
    assert cliff(path([rate] * (at + 2), [0.004] * at + [0.04, 0.004], start)) is None
    assert cliff(path([rate] * at + [rate * 10, rate], [0.004] * (at + 2), start)) == at


def test_jumps_among_steps_that_cost_next_to_nothing_are_none() -> None:
    assert cliff(path([0.0, -0.3, 1e-6, 0.001, 0.5, 0.0, 0.9])) is None
    assert cliff(path([1e-6, 1e-6, 1e-6, 0.9, 20.0])) == 4


def test_a_model_that_breaks_is_a_cliff() -> None:
    assert cliff(path([1.0, 1.0, 1.0, float("inf")])) == 3


def test_steps_without_figures_or_that_give_back_are_passed_over() -> None:
    steps = path([2.0, 2.0, 2.0, 2.0, 50.0])
    blind = steps[2].model_copy(update={"objective": None})
    assert cliff([*steps[:2], blind, *steps[3:]]) is None
    back = steps[3].model_copy(update={"units": (), "restored": ("decoder.0",), "objective": 3.0, "score": None})
    assert cliff([*steps[:4], back]) is None
    assert cliff([s.model_copy(update={"objective": None}) for s in steps]) is None
