"""Two processes that train together give what one gives, be it from the middle on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from heal.training.pairs import ended, sharing
from heal.training.training_bed import quick, run
from safetensors.torch import load_file

from billhook.plan.record import TrainingRecord

METHODS = {"distill": "distill", "tune": "tune", "lisa": "lisa", "ist": "ist", "fpf": "fpf", "lisa-killed": "lisa"}


class Killed(Exception):
    pass


def stop(_: str, done: int, __: int) -> None:
    if done == 10:
        raise Killed


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Also where they end what one began, and other blocks take their turn then: six turns, so that some come again."""
    changes = {"rate": 3e-3, "period": 2}
    with pytest.raises(Killed):
        run("llama", quick("lisa", **changes), tmp_path / "lisa-killed-state", progress=stop)
    jobs = [{"name": name, "method": method, "family": "llama", "changes": changes} for name, method in METHODS.items()]
    pair = sharing(tmp_path, jobs)
    alone = {method: run("llama", quick(method, **changes), tmp_path / method)[1:] for method in set(METHODS.values())}
    ended(pair)
    for name, method in METHODS.items():
        healing, record = alone[method]
        first, second = (load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in (0, 1))
        assert healing.tensors.keys() == first.keys() == second.keys() != set()
        for key, tensor in healing.tensors.items():
            torch.testing.assert_close(first[key], tensor, atol=1e-3, rtol=1e-3)
            assert torch.equal(first[key], second[key])
        written = json.loads((tmp_path / f"{name}-0.json").read_text())
        assert written["steps"] == (4 if name == "lisa-killed" else 12)
        curve = TrainingRecord.model_validate_json(json.dumps(written["record"])).curve
        assert [look.held for look in curve] == pytest.approx([look.held for look in record.curve], rel=1e-3)
        assert [look.loss for look in curve[1:]] == pytest.approx([look.loss for look in record.curve[1:]], rel=1e-3)
        assert record.curve[-1].held < record.curve[0].held
