"""Two processes that train together give what one gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from heal.pairs import ended, sharing
from heal.training_bed import quick, run
from safetensors.torch import load_file

from billhook.plan.record import TrainingRecord

METHODS = ("distill", "lisa")


def test_two_processes_are_one(tmp_path: Path) -> None:
    changes = {"rate": 3e-3}
    pair = sharing(
        tmp_path, [{"name": name, "method": name, "family": "llama", "changes": changes} for name in METHODS]
    )
    alone = {method: run("llama", quick(method, rate=3e-3), tmp_path / method)[1:] for method in METHODS}
    ended(pair)
    for method, (healing, record) in alone.items():
        first, second = (load_file(tmp_path / f"{method}-{rank}.safetensors") for rank in (0, 1))
        assert healing.tensors.keys() == first.keys() == second.keys() != set()
        for name, tensor in healing.tensors.items():
            torch.testing.assert_close(first[name], tensor, atol=1e-3, rtol=1e-3)
            assert torch.equal(first[name], second[name])
        written = json.loads((tmp_path / f"{method}-0.json").read_text())
        curve = TrainingRecord.model_validate_json(json.dumps(written["record"])).curve
        assert [look.held for look in curve] == pytest.approx([look.held for look in record.curve], rel=1e-3)
        assert [look.loss for look in curve[1:]] == pytest.approx([look.loss for look in record.curve[1:]], rel=1e-3)
        assert record.curve[-1].held < record.curve[0].held
