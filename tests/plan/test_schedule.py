"""The execution table: sound or refused, the same after a round trip, compiled to drops where it only leaves out."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outlines import outline as drawn

from billhook.plan.address import Address
from billhook.plan.check_schedule import check_schedule
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.schedule import Schedule, Site
from billhook.plan.visits import orders, shared, unvisited


def test_a_chain_says_how_often_and_in_which_order() -> None:
    schedule = Schedule.chain([0, 2, 2, 1])
    assert [(str(s.unit), s.verb, s.times) for s in schedule.tables[0]] == [
        ("decoder.0", "run", 1),
        ("decoder.2", "repeat", 2),
        ("decoder.1", "run", 1),
    ]
    assert schedule.order("decoder", 5) == [0, 2, 2, 1]
    assert schedule.order("encoder", 2) == [0, 1]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9))
def test_any_chain_is_its_own_order(visits: list[int]) -> None:
    schedule = Schedule.chain(visits)
    assert schedule.order("decoder", 5) == visits
    assert Schedule.model_validate_json(schedule.model_dump_json()) == schedule


def test_what_a_schedule_makes_of_the_order() -> None:
    outline = drawn(5)
    plan = Plan.of(["decoder.3"]).model_copy(update={"schedule": Schedule.chain([0, 1, 1, 4])})
    assert orders(plan, outline) == {"decoder": [0, 1, 1, 4]}
    assert unvisited(orders(plan, outline), outline) == {Address("decoder", 2), Address("decoder", 3)}
    assert shared(plan, outline) == {Address("decoder", 2): Address("decoder", 1)}
    skipping = Plan(schedule=Schedule.skipping(["decoder.3", "decoder.1.mlp"]))
    assert orders(skipping, outline) == {"decoder": [0, 1, 2, 4]}
    assert shared(skipping, outline) == {}
    assert orders(Plan(schedule=Schedule()), outline) == orders(Plan(), outline) == {"decoder": [0, 1, 2, 3, 4]}
    looped = Plan(schedule=Schedule.chain([0, 1, 1, 2, 3, 4]))
    assert orders(looped, outline)["decoder"] == [0, 1, 1, 2, 3, 4]
    assert shared(looped, outline) == {}, "no block has lost its weights"


@pytest.mark.parametrize("target", ["uniform", "deci"])
def test_no_ordinary_form_has_shared_weights(target: str) -> None:
    plan = Plan(target=target, schedule=Schedule.chain([0, 1, 1, 4]))
    with pytest.raises(InputError, match=f"target {target} cannot carry blocks that share weights"):
        orders(plan, drawn(5))


def test_what_is_dropped_does_not_run() -> None:
    plan = Plan.of(["decoder.1"]).model_copy(update={"schedule": Schedule.chain([0, 1, 2])})
    with pytest.raises(InputError, match="dropped by the plan, and its schedule runs it"):
        orders(plan, drawn(5))


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ([[{"unit": "decoder.1.mlp", "verb": "run"}]], "only whole blocks"),
        ([[{"unit": "decoder.1", "verb": "repeat"}]], "times must be 2"),
        ([[{"unit": "decoder.1", "verb": "run", "times": 3}]], "times is for repeat"),
        ([[{"unit": "decoder.1", "verb": "skip"}, {"unit": "decoder.1", "verb": "skip"}]], "twice"),
        ([[{"unit": "decoder.1", "verb": "skip"}, {"unit": "decoder.1", "verb": "run"}]], "both runs and is left out"),
        ([[{"unit": "decoder.1", "verb": "reuse"}]], "more than one table"),
        ([[], [{"unit": "decoder.1", "verb": "run"}]], "same at every step"),
        ([[{"unit": "decoder", "verb": "skip"}]], "not of the form"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_plan_with_the_reason(tables: object, reason: str) -> None:
    content = {"schema_version": 1, "schedule": {"tables": tables}}
    with pytest.raises(InputError, match=reason):
        Plan.loads(json.dumps(content))


def test_tables_take_turns() -> None:
    cheap = (Site(unit="decoder.2", verb="reuse"), Site(unit="decoder.1.mlp", verb="skip"))
    schedule = Schedule(tables=((), cheap, cheap))
    assert [bool(schedule.reuses(step)) for step in range(6)] == [False, True, True, False, True, True]
    assert schedule.skips(4) == {Address("decoder", 1, "mlp")}
    assert not schedule.constant


def test_a_schedule_for_another_model_is_refused() -> None:
    outline = drawn(5)
    check_schedule(Schedule.chain([0, 3, 3, 1]), outline)
    with pytest.raises(InputError, match=r"decoder.5 of the schedule is not in this"):
        check_schedule(Schedule.skipping(["decoder.5"]), outline)
    with pytest.raises(InputError, match="at least one must stay"):
        check_schedule(Schedule.skipping([f"decoder.{i}.attention" for i in range(5)]), outline)
    pinned = outline.model_copy(update={"pinned": {"decoder.0": "it comes first"}})
    with pytest.raises(InputError, match="cannot be moved or repeated: it comes first"):
        check_schedule(Schedule.chain([1, 0, 2]), pinned)


def test_a_plan_carries_a_schedule_and_older_plans_have_none() -> None:
    plan = Plan(schedule=Schedule.skipping(["decoder.3"]))
    assert Plan.loads(plan.dumps()) == plan
    assert Plan.loads('{"schema_version": 1}').schedule is None
