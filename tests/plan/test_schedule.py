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
from billhook.plan.schedule import Schedule, Site, compiled


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


def test_what_only_leaves_out_compiles_to_drops() -> None:
    outline = drawn(5)
    schedule = Schedule.skipping(["decoder.3", "decoder.1.mlp"])
    assert compiled(schedule, outline) == {Address("decoder", 3), Address("decoder", 1, "mlp")}
    assert compiled(Schedule.chain([0, 1, 4]), outline) == {Address("decoder", 2), Address("decoder", 3)}
    assert compiled(Schedule(), outline) == frozenset()
    for other in (Schedule.chain([0, 1, 1, 2, 3, 4]), Schedule.chain([0, 2, 1, 3, 4])):
        with pytest.raises(InputError, match="repeats or reorders"):
            compiled(other, outline)


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
