"""A checkpoint cut on disk is the one that loading, applying and saving gives."""

from __future__ import annotations

import gc
import json
import os
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, params
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from live import drops
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from billhook import export, models
from billhook.anatomy import Anatomy, discover
from billhook.measure.cost import cost
from billhook.models import building
from billhook.plan.check import units
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.surgery import apply, checkpoint
from billhook.surgery.checkpoint import apply_to_checkpoint, checkpoint_fingerprint, rewrite
from billhook.surgery.reopen import load, skeleton

few = settings(max_examples=3, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])
PLAN = Plan.of(["decoder.1", "decoder.3.mlp", "decoder.0.attention"])
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@cache
def dense(name: str) -> tuple[PreTrainedModel, Anatomy]:
    model = build(name)
    return model, discover(model)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    dense("llama")[0].save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def assert_same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor] | None]) -> dict[str, Tensor]:
    """Change the tensors of a folder in place; gives the changed ones."""
    tensors = load_file(folder / WEIGHTS)
    tensors = change(tensors) or tensors
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return tensors


def sizes(path: Path) -> dict[str, int]:
    """Bytes of each stored tensor."""
    return {name: tensor.nbytes for name, tensor in load_file(path).items()}


def stored_buffers(model: PreTrainedModel) -> int:
    """Bytes of what is stored and is no parameter."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return sum(tensor.nbytes for name, tensor in model.state_dict().items() if name not in parameters)


@pytest.mark.parametrize("name", params)
@given(data=st.data())
@few
def test_every_family_and_form(name: str, data: st.DataObject) -> None:
    model, anatomy = dense(name)
    plan = Plan.of(data.draw(drops(anatomy.outline)))
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        model.save_pretrained(root / "source")
        export.save_checkpoint(root / "source", plan, root / "disk")
        with building(root / "memory") as folder:
            export.save(apply(model, anatomy, plan), anatomy, plan, folder)
        files = {path.name for path in (root / "memory").iterdir()}
        assert {path.name for path in (root / "disk").iterdir()} == files
        assert_same_tensors(load_file(root / "disk" / WEIGHTS), load_file(root / "memory" / WEIGHTS))
        before, after = (sizes(root / folder / WEIGHTS) for folder in ("source", "disk"))
        gone = 4 * (cost(anatomy.outline)["params"] - cost(anatomy.outline, plan.drops)["params"])
        gone += stored_buffers(model) - stored_buffers(apply(model, anatomy, plan))
        assert sum(before.values()) == sum(after.values()) + gone, "every byte is kept or was dropped by name"
        for text in files - {WEIGHTS}:
            assert (root / "disk" / text).read_text() == (root / "memory" / text).read_text(), text


@pytest.mark.parametrize("name", params)
def test_the_fingerprint_is_that_of_the_loaded_model(name: str, tmp_path: Path) -> None:
    model, anatomy = dense(name)
    model.save_pretrained(tmp_path / "source", max_shard_size="40KB")
    assert checkpoint_fingerprint(tmp_path / "source") == models.fingerprint(model)
    first = next(iter(units(anatomy.outline, "sublayer")))
    export.save_checkpoint(tmp_path / "source", Plan.of([first]), tmp_path / "out")
    assert checkpoint_fingerprint(tmp_path / "out") == models.fingerprint(apply(model, anatomy, [first]))


def test_the_fingerprint_of_weights_that_are_computed_on_loading(tmp_path: Path) -> None:
    config = Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, use_swiglu_ffn=True)
    model = Dinov2Model(config)
    model.save_pretrained(tmp_path / "source")
    assert any("weights_in" in name for name in load_file(tmp_path / "source" / WEIGHTS))
    assert checkpoint_fingerprint(tmp_path / "source") == models.fingerprint(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_structure_is_in_the_dtype_of_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    build("llama").to(dtype).save_pretrained(tmp_path)
    of_file, of_model = (discover(model).outline for model in (skeleton(tmp_path), load(tmp_path).model))
    assert of_file == of_model and of_file.bytes_per_param == dtype.itemsize


def test_the_empty_plan_copies(source: Path, tmp_path: Path) -> None:
    apply_to_checkpoint(source, Plan(), tmp_path / "out")
    assert_same_tensors(load_file(tmp_path / "out" / WEIGHTS), load_file(source / WEIGHTS))
    with safe_open(tmp_path / "out" / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_tensor_keeps_its_dtype(source: Path, tmp_path: Path) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

    def mix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.to(dtypes[i % 4]) for i, (name, t) in enumerate(tensors.items())}

    mixed = edit(source, mix)
    apply_to_checkpoint(source, Plan.of(["decoder.4", "decoder.3.mlp"]), tmp_path / "out")
    kept = load_file(tmp_path / "out" / WEIGHTS)
    assert {t.dtype for t in kept.values()} == set(dtypes)
    assert_same_tensors(kept, {name: mixed[name] for name in kept})


def test_shards_in_shards_out(tmp_path: Path) -> None:
    model, anatomy = dense("llama")
    model.save_pretrained(tmp_path / "source", max_shard_size="25KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    out = apply_to_checkpoint(tmp_path / "source", PLAN, tmp_path / "out")
    index = json.loads((out / INDEX).read_text())
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    merged: dict[str, Tensor] = {}
    for name in shards:
        tensors = load_file(out / name)
        assert tensors and all(index["weight_map"][key] == name for key in tensors)
        merged |= tensors
    assert index["weight_map"].keys() == merged.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in merged.values())
    apply(model, anatomy, PLAN).save_pretrained(tmp_path / "whole")
    assert_same_tensors(merged, load_file(tmp_path / "whole" / WEIGHTS))


def test_a_checkpoint_keeps_its_own_naming(tmp_path: Path) -> None:
    model, anatomy = dense("gpt2")
    model.save_pretrained(tmp_path / "source")
    plan = Plan.of(["decoder.0", "decoder.2.attention"])
    bare = lambda tensors: {name.removeprefix("transformer."): t for name, t in tensors.items()}  # noqa: E731
    edit(tmp_path / "source", bare)
    apply_to_checkpoint(tmp_path / "source", plan, tmp_path / "out")
    apply(model, anatomy, plan).save_pretrained(tmp_path / "expected")
    assert_same_tensors(load_file(tmp_path / "out" / WEIGHTS), bare(load_file(tmp_path / "expected" / WEIGHTS)))


@pytest.mark.parametrize("original", [True, False])
def test_fused_and_single_experts(original: bool, tmp_path: Path) -> None:
    model, anatomy = dense("mixtral")
    plan = Plan.of(["decoder.0", "decoder.2.mlp"])
    model.save_pretrained(tmp_path / "source", save_original_format=original)
    apply_to_checkpoint(tmp_path / "source", plan, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert any(re.search(r"layers\.0\..*experts\.3\.", name) for name in tensors) == original
    apply(model, anatomy, plan).save_pretrained(tmp_path / "expected", save_original_format=original)
    assert_same_tensors(tensors, load_file(tmp_path / "expected" / WEIGHTS))


@pytest.mark.parametrize("copies", [1, 2])
def test_tied_weights_stay_as_they_were_stored(copies: int, source: Path, tmp_path: Path) -> None:
    if copies == 2:
        edit(source, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    apply_to_checkpoint(source, PLAN, tmp_path / "out")
    names = load_file(tmp_path / "out" / WEIGHTS).keys()
    assert len({"lm_head.weight", "model.embed_tokens.weight"} & names) == copies
    assert models.load(source).model.lm_head.weight is not None


def test_what_the_model_ignores_stays_behind(source: Path, tmp_path: Path) -> None:
    edit(source, lambda t: t | {"model.layers.2.self_attn.rotary_emb.inv_freq": torch.ones(5)})
    apply_to_checkpoint(source, Plan.of(["decoder.1"]), tmp_path / "out")
    assert not any("inv_freq" in name for name in load_file(tmp_path / "out" / WEIGHTS))


def test_the_head_of_another_task_stays_behind_as_in_loading(tmp_path: Path) -> None:
    dense("bert")[0].save_pretrained(tmp_path / "source")
    head = {"cls.seq_relationship.weight": torch.ones(2, 3), "cls.seq_relationship.bias": torch.ones(2)}
    edit(tmp_path / "source", lambda tensors: tensors | head)
    (tmp_path / "out").mkdir()
    done = rewrite(tmp_path / "source", Plan.of(["encoder.1"]), tmp_path / "out")
    assert done.left_out == models.load(tmp_path / "source").left_out == tuple(sorted(head))
    assert not head.keys() & load_file(tmp_path / "out" / WEIGHTS).keys()
    assert models.load(tmp_path / "out").left_out == ()


def test_the_other_files_come_along(tiny_lm: Path, tmp_path: Path) -> None:
    apply_to_checkpoint(tiny_lm, PLAN, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in tiny_lm.iterdir()}
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny_lm / name).read_bytes()


def drop_tensor(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.3.mlp.up_proj.weight"]


def add_tensor(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.3.mlp.router.weight"] = torch.ones(3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: os.truncate(f / WEIGHTS, 60_000), f"{WEIGHTS} is corrupt or cut short"),
        (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 100), f"{WEIGHTS} is corrupt or cut short"),
        (lambda f: (f / WEIGHTS).unlink(), "has no model.safetensors"),
        (lambda f: edit(f, drop_tensor), "lacks weights .* model.layers.3.mlp.up_proj.weight"),
        (lambda f: edit(f, add_tensor), "no place for: model.layers.3.mlp.router.weight"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "names the architecture None"),
    ],
)
def test_damage_is_named_and_nothing_written(
    damage: Callable[[Path], Any], message: str, source: Path, tmp_path: Path
) -> None:
    damage(source)
    with pytest.raises(InputError, match=message):
        apply_to_checkpoint(source, PLAN, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda a, b, index: save_file(load_file(a) | load_file(b), b), "is in more than one file"),
        (lambda a, b, index: save_file({}, b), "which is in none of its files"),
        (lambda a, b, index: b.unlink(), "is missing"),
        (lambda a, b, index: os.truncate(b, 300), "00002.*corrupt or cut short"),
        (lambda a, b, index: index.write_text("{}"), "is not an index"),
    ],
)
def test_damaged_shards_are_named(damage: Callable[[Path, Path, Path], Any], message: str, tmp_path: Path) -> None:
    dense("llama")[0].save_pretrained(tmp_path / "source", max_shard_size="25KB")
    first, second = sorted((tmp_path / "source").glob("*.safetensors"))[:2]
    damage(first, second, tmp_path / "source" / INDEX)
    with pytest.raises(InputError, match=message):
        apply_to_checkpoint(tmp_path / "source", PLAN, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_impossible_plan_writes_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unit decoder\.9 is not in"):
        apply_to_checkpoint(source, Plan.of(["decoder.9"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interruption_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, *rest: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply_to_checkpoint(source, PLAN, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_existing_target_stays(source: Path, tmp_path: Path) -> None:
    apply_to_checkpoint(source, Plan.of(["decoder.1"]), tmp_path / "out")
    before = (tmp_path / "out" / WEIGHTS).read_bytes()
    with pytest.raises(InputError, match="already exists"):
        apply_to_checkpoint(source, PLAN, tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == before
    apply_to_checkpoint(source, PLAN, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() != before


def _kilobytes(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+)", text)[1])  # type: ignore[index]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory where Linux keeps it")
def test_memory_stays_below_two_shards(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 101, "hidden_size": 1024, "intermediate_size": 4096}
    config = LlamaConfig(**sizes, num_hidden_layers=6, num_attention_heads=8, architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    config.save_pretrained(tmp_path / "source")
    shards: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        number = re.search(r"layers\.(\d+)", name)
        part = int(number[1]) // 2 if number else 2
        file = f"model-{part + 1:05d}-of-00003.safetensors"
        shards.setdefault(file, {})[name] = torch.zeros_like(tensor, device="cpu", dtype=torch.bfloat16)
    for file, tensors in shards.items():
        save_file(tensors, tmp_path / "source" / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (tmp_path / "source" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shard = max((tmp_path / "source" / file).stat().st_size for file in shards) // 1024
    shards.clear()
    tensors.clear()
    apply_to_checkpoint(tmp_path / "source", Plan.of(["decoder.1"]), tmp_path / "warm")
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _kilobytes("VmRSS")
    apply_to_checkpoint(tmp_path / "source", PLAN, tmp_path / "out")
    assert shard > 60_000
    assert _kilobytes("VmHWM") - before < 2 * shard
