"""What comes out holds everything that went in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from safetensors.torch import load_file

from billhook.models import load, save


@pytest.fixture
def source(tiny_lm: Path, tmp_path: Path) -> Path:
    """A model folder as they lie on the hub, with everything that belongs to one, and some that does not."""
    folder = Path(shutil.copytree(tiny_lm, tmp_path / "source"))
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "LICENSE").write_text("free")
    (folder / "modules.json").write_text("[]")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500" / "trainer_state.json").write_text("{}")
    (folder / "checkpoint-500" / "model.safetensors").write_bytes(b"")
    (folder / ".git").mkdir()
    (folder / ".git" / "refs.txt").write_text("")
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"")
    (folder / "modeling_own.py").write_text("")
    (folder / "billhook.json").write_text("{}")
    return folder


def saved(source: Path, tmp_path: Path) -> Path:
    loaded = load(source)
    out = tmp_path / "out"
    out.mkdir()
    save(loaded.model, loaded.tokenizer, out, source)
    return out


def test_all_that_belongs_to_the_model_comes_along(source: Path, tmp_path: Path) -> None:
    out = saved(source, tmp_path)
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    original = {path.name for path in source.iterdir() if path.is_file()}
    left = {"billhook.json", "model.safetensors.index.json", "pytorch_model.bin", "modeling_own.py"}
    assert files == (original - left) | {"1_Pooling/config.json"}
    assert {"chat_template.jinja", "generation_config.json", "tokenizer.json"} <= files


def test_tensors_and_settings_are_those_of_the_source(source: Path, tmp_path: Path) -> None:
    out = saved(source, tmp_path)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()  # tied weights once
    assert all(before[k].dtype == after[k].dtype and torch.equal(before[k], after[k]) for k in before)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text()) == json.loads((source / name).read_text())
    first, second = load(source), load(out)
    assert first.tokenizer("some words").input_ids == second.tokenizer("some words").input_ids
    assert first.tokenizer.chat_template == second.tokenizer.chat_template


def test_tied_weights_stay_tied(source: Path, tmp_path: Path) -> None:
    out = saved(source, tmp_path)
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    model = load(out).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_every_tensor_keeps_its_dtype(tmp_path: Path) -> None:
    model = build("llama").bfloat16()
    model.model.norm.float()
    save(model, None, tmp_path)
    stored = {name: tensor.dtype for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert stored.pop("model.norm.weight") == torch.float32
    assert set(stored.values()) == {torch.bfloat16}


def flags(model: Any) -> list[object]:
    return [
        *(module.training for module in model.modules()),
        *(parameter.requires_grad for parameter in model.parameters()),
        model.config.use_cache,
        model.generation_config.use_cache,
    ]


def test_no_flag_of_the_live_model_changes(tmp_path: Path) -> None:
    model = build("llama").train()
    model.model.layers[1].eval()
    model.model.norm.weight.requires_grad_(False)
    before = flags(model)
    save(model, None, tmp_path)
    assert flags(model) == before


def test_a_published_generation_config_that_contradicts_itself_is_kept(source: Path, tmp_path: Path) -> None:
    path = source / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.6, "do_sample": False}))
    out = saved(source, tmp_path)
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.6


def test_a_model_without_tokenizer_saves(tmp_path: Path) -> None:
    save(build("vit"), None, tmp_path)
    assert load(tmp_path).tokenizer is None


def test_only_safetensors_and_json_are_written(source: Path, tmp_path: Path) -> None:
    out = saved(source, tmp_path)
    suffixes = {path.suffix for path in out.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jinja", ".txt", ""}
