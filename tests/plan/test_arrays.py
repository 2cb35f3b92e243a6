import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from billhook.plan.arrays import Arrays
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan


def _plan(**content: Any) -> Plan:
    return Plan.of(["decoder.1"]).model_copy(update={"arrays": Arrays(content)})


def test_a_plan_file_comes_back_with_its_arrays(tmp_path: Path) -> None:
    plan = _plan(b=np.arange(6, dtype=np.uint8).reshape(2, 3), a=np.ones((2, 2), np.float32)[:, ::2])
    plan.write(tmp_path / "plan.json")
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "plan.arrays"}
    again = Plan.read(tmp_path / "plan.json")
    assert again == plan and list(again.arrays) == ["a", "b"]
    assert all(np.array_equal(again.arrays[name], plan.arrays[name]) for name in ("a", "b"))


def test_a_plan_inside_a_record_has_them_beside_the_record(tmp_path: Path) -> None:
    plan = _plan(a=np.ones(3, np.uint8))
    (tmp_path / "billhook.json").write_text(json.dumps({"plan": json.loads(plan.dumps())}))
    plan.arrays.write(tmp_path / "billhook.json")
    assert np.array_equal(Plan.read(tmp_path).arrays["a"], plan.arrays["a"])


def test_one_bit_makes_another_plan_and_order_of_names_does_not() -> None:
    one, other = (np.array([i], np.uint8) for i in (1, 2))
    assert _plan(a=one, b=other).dumps() == _plan(b=other, a=one).dumps()
    assert _plan(a=one, b=other) != _plan(a=other, b=one)
    assert _plan(a=one) != _plan(a=one.astype(np.int8))
    assert _plan(a=one) != _plan(a=one[None]) != _plan(b=one)


def test_a_plan_without_arrays_says_and_writes_nothing_of_them(tmp_path: Path) -> None:
    Plan.of(["decoder.1"]).write(tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert "arrays" not in (tmp_path / "plan.json").read_text()


def test_arrays_that_are_missing_damaged_or_of_another_plan_are_refused(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    _plan(a=np.ones(3, np.uint8)).write(plan)
    _plan(a=np.zeros(3, np.uint8)).arrays.write(plan)
    with pytest.raises(InputError, match=r"plan\.arrays does not belong to plan"):
        Plan.read(plan)
    plan.with_suffix(".arrays").write_bytes(b"no safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        Plan.read(plan)
    plan.with_suffix(".arrays").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        Plan.read(plan)


def test_a_plan_parsed_without_its_file_is_equal_but_has_nothing_to_look_into() -> None:
    plan = _plan(a=np.ones(3, np.uint8))
    parsed = Plan.loads(plan.dumps())
    assert parsed == plan
    with pytest.raises(InputError, match="has not been read"):
        parsed.arrays["a"]
    with pytest.raises(InputError, match="names the array b"):
        plan.arrays["b"]
    with pytest.raises(InputError, match="arrays"):
        Plan.loads('{"arrays": {"a": [1]}}')


def test_they_go_from_process_to_process() -> None:
    """Several that heal together share what the first of them chose."""
    arrays = Arrays({"b": np.arange(3), "a": np.ones((2, 2))})
    again = pickle.loads(pickle.dumps(arrays))
    assert again == arrays and all((again[name] == arrays[name]).all() for name in arrays)
    bare = Arrays(digest=arrays.digest)
    assert pickle.loads(pickle.dumps(bare)) == bare
    plan = Plan.of(["decoder.1"], arrays=arrays)
    assert pickle.loads(pickle.dumps(plan)) == plan
