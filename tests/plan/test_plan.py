import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Drop, Plan, Provenance
from billhook.plan.target import Target

FIXTURES = Path(__file__).parent / "fixtures"
units = st.builds(Address, st.just("decoder"), st.integers(0, 40), st.sampled_from([None, "attention", "mlp"]))
plans = st.builds(
    lambda drops, target, budget, provenance: Plan.of(drops, target).model_copy(
        update={"budget": budget, "provenance": provenance}
    ),
    st.frozensets(units, max_size=8),
    st.sampled_from(Target),
    st.none() | st.just("params=0.8"),
    st.builds(Provenance, model=st.text(max_size=8), seed=st.none() | st.integers(0, 9)),
)


@given(plans)
def test_round_trip(plan: Plan) -> None:
    assert Plan.loads(plan.dumps()) == plan
    assert Plan.loads(plan.dumps()).dumps() == plan.dumps()


@given(st.lists(units, max_size=8))
def test_the_same_drops_are_the_same_bytes_in_whatever_order_they_come(drops: list[Address]) -> None:
    text = Plan.of(drops).dumps()
    assert Plan.of(reversed(drops)).dumps() == text
    assert Plan.of(str(a) for a in sorted(drops)).dumps() == text
    assert Plan.of(drops).drops == frozenset(drops)


def test_the_bytes_of_a_plan() -> None:
    """The format is public: a change to these bytes needs a new schema version."""
    assert Plan.of(["decoder.2.mlp", "decoder.1"], Target.REMOTE).dumps() == (FIXTURES / "version-1.json").read_text()


def test_an_old_file_still_reads() -> None:
    plan = Plan.read(FIXTURES / "version-1.json")
    assert plan.drops == {Address("decoder", 1), Address("decoder", 2, "mlp")}
    assert plan.target is Target.REMOTE


def test_read_takes_a_plan_a_run_or_the_folder_of_one(tmp_path: Path) -> None:
    plan = Plan.of(["decoder.3"])
    bare, run = tmp_path / "plan.json", tmp_path / "billhook.json"
    bare.write_text(plan.dumps())
    run.write_text(json.dumps({"model": "anything", "plan": json.loads(plan.dumps())}))
    assert Plan.read(bare) == Plan.read(run) == Plan.read(tmp_path) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("9" * 5000, "is not JSON"),
        ("[]", "the top level"),
        ('{"schema_version": 2}', "has schema_version 2; this version of Billhook reads 1"),
        ('{"schema_version": "1"}', "has schema_version '1'; this version of Billhook reads 1"),
        ('{"edit": []}', "edit: Extra inputs are not permitted"),
        ('{"edits": [{"unit": "decoder.1", "ratio": 0.5}]}', "edits.0.ratio: Extra inputs are not permitted"),
        ('{"provenance": {"host": "x"}}', "provenance.host: Extra inputs are not permitted"),
        ('{"edits": [{"kind": "merge", "unit": "decoder.1"}]}', "edits.0: Input tag 'merge' found using 'kind'"),
        ('{"edits": [{"unit": "layer 1"}]}', "edits.0.unit: address 'layer 1' is not of the form"),
        ('{"edits": [{"unit": 1}]}', "edits.0.unit: an address is a text such as decoder.12, not 1"),
        ('{"edits": [{"unit": {"stack": "decoder", "block": -1}}]}', "edits.0.unit: an address is a text"),
        ('{"edits": [{}]}', "edits.0.unit: Field required"),
        ('{"target": "onnx"}', "target: Input should be"),
    ],
)
def test_a_bad_plan_gets_one_line_that_names_the_place(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Plan.loads(text, name="mine.json")
    assert str(caught.value).startswith("mine.json ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "plan.json"
    binary.write_bytes(b"\xff\xfe")
    for path in (tmp_path / "absent.json", tmp_path, binary):
        with pytest.raises(InputError, match="cannot be read"):
            Plan.read(path)


def test_plans_do_not_change() -> None:
    plan = Plan.of(["decoder.1"])
    with pytest.raises(ValueError, match="frozen"):
        plan.budget = "params=0.5"  # type: ignore[misc]
    assert plan.edits == (Drop(unit=Address("decoder", 1)),)
