"""Half precision that the processor only emulates is computed in float32 and stored as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from safetensors.torch import load_file

from billhook import models
from billhook.models import dtype_of, emulated, precision, stored_as
from billhook.recipes import compress
from billhook.recipes.opened import environment, opened


def test_what_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "native", lambda dtype: False)
    assert not emulated(build("llama"))
    assert emulated(build("llama").bfloat16())
    mixed = build("llama").bfloat16()
    mixed.model.norm.float()
    assert not emulated(mixed)
    monkeypatch.setattr(precision, "native", lambda dtype: True)
    assert not emulated(build("llama").bfloat16())


def test_stored_and_back(tmp_path: Path) -> None:
    model = build("llama").bfloat16().float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    with pytest.raises(KeyError), stored_as(model, torch.bfloat16):
        assert dtype_of(model) == torch.bfloat16
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
        model.save_pretrained(tmp_path)
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = models.load(tmp_path).model
    assert dtype_of(again) == torch.bfloat16
    assert all(torch.equal(value.float(), before[name]) for name, value in again.state_dict().items())


def test_mixed_weights_stay_mixed() -> None:
    model = build("llama").bfloat16()
    model.model.norm.float()
    with stored_as(model, torch.bfloat16):
        assert model.model.norm.weight.dtype == torch.float32


@pytest.fixture
def half(tiny_lm: Path, tmp_path: Path) -> Path:
    """The tiny model in bfloat16."""
    loaded = models.load(tiny_lm, dtype="bfloat16")
    folder = tmp_path / "half"
    folder.mkdir()
    models.save(loaded.model, loaded.tokenizer, folder, tiny_lm)
    return folder


def test_opened_in_float32_or_as_told(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "native", lambda dtype: False)
    settings: dict[str, Any] = {"device": "cpu", "trust_remote_code": False}
    fast = opened(half, dtype=None, **settings)
    assert (dtype_of(fast.model), fast.stored) == (torch.float32, torch.bfloat16)
    assert environment(fast)["dtype"] == "float32, stored as bfloat16"
    assert fast.anatomy.outline.bytes_per_param == 2
    told = opened(half, dtype="bfloat16", **settings)
    assert (dtype_of(told.model), told.stored) == (torch.bfloat16, torch.bfloat16)
    other = opened(half, dtype=None, like=fast, **settings)
    assert (dtype_of(other.model), other.stored) == (torch.float32, torch.bfloat16)
    assert dtype_of(opened(half, dtype=None, like=told, **settings).model) == torch.bfloat16


def test_what_is_proven_is_what_is_saved(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The healed weights are rounded before the proof: judged again from disk the result has the same perplexity."""
    from billhook.recipes.evaluate import evaluate

    monkeypatch.setattr(precision, "native", lambda dtype: False)
    out = tmp_path / "out"
    run = compress.compress(half, budget="blocks=4", out=out, recipe="block-influence", heal="closed-form")
    assert run.healing is not None and any(refit.taken for refit in run.healing.refits)
    tensors = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    again = evaluate(out)
    for proven, found in zip(run.evidence, again.evidence, strict=True):
        assert found.perplexity_compressed.value == pytest.approx(proven.perplexity_compressed.value, rel=1e-6)
