"""A state is whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from billhook.heal.training.state import keep, kept
from billhook.plan.errors import InputError


def test_what_was_kept_comes_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    assert kept(path, {"seed": 1}) is None
    tensors = {"a b": torch.randn(2, 3).to(torch.bfloat16).T, "n": torch.tensor(3.0)}
    keep(path, tensors, {"seed": 1, "curve": [0.1 + 0.2]})
    found = kept(path, {"seed": 1})
    assert found is not None
    assert found[1]["curve"] == [0.1 + 0.2]
    assert found[0].keys() == tensors.keys()
    assert all(torch.equal(found[0][key], tensor) for key, tensor in tensors.items())


def test_a_crash_while_writing_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.safetensors"
    keep(path, {"a": torch.zeros(1)}, {"n": 1})

    def torn(*args: object, **named: object) -> None:
        path.with_suffix(".part").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("billhook.heal.training.state.save_file", torn)
    with pytest.raises(KeyboardInterrupt):
        keep(path, {"a": torch.ones(1)}, {"n": 2})
    found = kept(path, {"n": 1})
    assert found is not None and found[0]["a"].item() == 0


def test_another_owner_and_damage_are_named(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    keep(path, {"a": torch.zeros(1)}, {"seed": 1})
    with pytest.raises(InputError, match=r"belongs to another run \(seed is 1 there and 2 here\)"):
        kept(path, {"seed": 2})
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match="damaged; remove it"):
        kept(path, {"seed": 1})
