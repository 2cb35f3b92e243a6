"""Narrower models saved, loaded again, and cut on disk: every family, every form."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, build, params
from live import generate, inputs_of, logits, stock_load
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from widths import narrowings

from billhook import export
from billhook.anatomy import Anatomy, discover
from billhook.models import building
from billhook.plan.address import Address
from billhook.plan.check import check
from billhook.plan.errors import InputError
from billhook.plan.plan import Keep, Plan
from billhook.plan.target import Target
from billhook.surgery import apply
from billhook.surgery.checkpoint import apply_to_checkpoint
from billhook.surgery.reopen import load

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@cache
def dense(name: str) -> tuple[PreTrainedModel, Anatomy]:
    model = build(name)
    return model, discover(model)


def saved(model: PreTrainedModel, plan: Plan, out: Path) -> PreTrainedModel:
    """The applied model, after it was saved to ``out``."""
    anatomy = discover(model)
    applied = apply(model, anatomy, plan)
    with building(out) as folder:
        export.save(applied, anatomy, plan, folder)
    return applied


def same(name: str, model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Bit by bit, with the other's weights where torch itself would put them (see ``test_reopen``)."""
    for parameter in other.parameters():
        parameter.data = parameter.data.clone()
    for batch, padding in inputs_of(name)[-1:]:
        assert torch.equal(logits(name, model, batch, padding), logits(name, other, batch, padding))


def mixed(anatomy: Anatomy, seed: int) -> Plan:
    """A sublayer and a block dropped where that is possible, everything else narrowed at random."""
    gone: list[Address] = []
    for stack in anatomy.outline.stacks:
        for unit in (Address(stack.name, 1, "attention"), Address(stack.name, 2, "mlp"), Address(stack.name, 3)):
            try:
                check(Plan.of([*gone, unit]), anatomy.outline)
                gone.append(unit)
            except InputError:
                continue
    return Plan.of(gone, keeps=narrowings(anatomy, seed, gone))


@pytest.mark.parametrize("name", params)
def test_saved_loaded_and_cut_on_disk_agree(name: str) -> None:
    model, anatomy = dense(name)
    plan = mixed(anatomy, seed=1)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        applied = saved(model, plan, root / "memory")
        loaded = load(root / "memory").model
        assert type(loaded) is type(applied)
        same(name, applied, loaded)
        same(name, applied, stock_load(root / "memory"))
        model.save_pretrained(root / "source")
        export.save_checkpoint(root / "source", plan, root / "disk")
        files = {path.name for path in (root / "memory").iterdir()}
        assert files >= {"config.json", "modeling_billhook.py"}
        assert {path.name for path in (root / "disk").iterdir()} == files
        memory, disk = (load_file(root / folder / WEIGHTS) for folder in ("memory", "disk"))
        assert memory.keys() == disk.keys()
        assert all(torch.equal(disk[key], value) for key, value in memory.items())
        for text in files - {WEIGHTS}:
            assert (root / "disk" / text).read_text() == (root / "memory" / text).read_text(), text


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gpt2", "mixtral", "t5", "whisper", "vit", "gemma3_image"])
def test_equal_widths_are_an_ordinary_checkpoint(name: str, tmp_path: Path) -> None:
    model, anatomy = dense(name)
    wide = {"neuron": 30, "group": 1, "expert": 3}
    keeps = [
        edit
        for edit in narrowings(anatomy, 2, pick=lambda _, inner: min(wide[inner.kind], inner.count))
        if anatomy.inner[edit.unit][0].keys
    ]
    assert keeps
    applied = saved(model, Plan.of([], Target.UNIFORM, keeps), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"auto_map", "per_layer_config", "inner_units"} & config.keys()
    assert not list((tmp_path / "out").glob("*.py"))
    loaded = stock_load(tmp_path / "out")
    same(name, applied, loaded)
    if FAMILIES[name].generates:
        for a, b in zip(generate(name, applied, use_cache=True), generate(name, loaded, use_cache=True), strict=True):
            assert torch.equal(a, b)


def test_the_config_says_it_in_transformers_own_words(tmp_path: Path) -> None:
    mlp, attention = Address("decoder", 2, "mlp"), Address("decoder", 4, "attention")
    keeps = [Keep(unit=mlp, inner="neuron", indices=(1, 5)), Keep(unit=attention, inner="group", indices=(0, 2))]
    saved(dense("llama")[0], Plan.of(["decoder.1", "decoder.2.attention"], keeps=keeps), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["per_layer_config"] == {
        "1": {"intermediate_size": 2, "skip": ["attention"]},
        "3": {"num_attention_heads": 4, "num_key_value_heads": 2},
    }
    assert (config["intermediate_size"], config["num_attention_heads"], config["head_dim"]) == (48, 6, 10)
    layers = transformers.AutoConfig.from_pretrained(tmp_path / "out").per_layer_config
    assert [layer.intermediate_size for layer in layers] == [48, 2, 48, 48]


@pytest.mark.parametrize("name", ["llama", "bart", "gpt2", "mixtral"])
def test_a_second_cut_adds_to_the_first(name: str, tmp_path: Path) -> None:
    """Narrow every second sublayer, drop, narrow all: in steps, on disk, and at once."""
    model, anatomy = dense(name)
    first = [edit for edit in narrowings(anatomy, 4) if edit.unit.block % 2 and edit.unit.stack == "decoder"]
    saved(model, Plan.of([], keeps=first), tmp_path / "one")
    once = load(tmp_path / "one").model
    then = discover(once)
    gone = [Address("decoder", 0), Address("decoder", 3, "mlp")]
    second = narrowings(then, 5, gone)
    plan = Plan.of(gone, keeps=second)
    saved(once, plan, tmp_path / "two")
    export.save_checkpoint(tmp_path / "one", plan, tmp_path / "disk")
    before = {edit.unit: edit.indices for edit in first}
    both = [
        edit.model_copy(update={"indices": tuple(before[edit.unit][i] for i in edit.indices)})
        if edit.unit in before
        else edit
        for edit in second
    ]
    at_once = apply(model, anatomy, Plan.of(gone, keeps=both))
    for out in ("two", "disk"):
        same(name, at_once, load(tmp_path / out).model)
        same(name, at_once, stock_load(tmp_path / out))


def test_what_becomes_even_again_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    model, anatomy = dense("llama")
    wide = {i: Keep(unit=Address("decoder", i, "mlp"), inner="neuron", indices=tuple(range(20))) for i in range(5)}
    saved(model, Plan.of([], keeps=[wide[i] for i in (0, 1, 3)]), tmp_path / "one")
    once = load(tmp_path / "one").model
    plan = Plan.of(["decoder.2"], Target.UNIFORM, [wide[4]])
    saved(once, plan, tmp_path / "two")
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["intermediate_size"] == 20
    assert not [key for key in config if "per_layer" in key] and "auto_map" not in config
    same(
        "llama",
        apply(model, anatomy, Plan.of(["decoder.2"], keeps=[wide[i] for i in (0, 1, 3, 4)])),
        stock_load(tmp_path / "two"),
    )


@pytest.mark.parametrize("original", [True, False])
def test_experts_in_one_tensor_or_each_in_its_own(original: bool, tmp_path: Path) -> None:
    model, anatomy = dense("mixtral")
    keeps = [
        Keep(unit=Address("decoder", 2, "mlp"), inner="expert", indices=(0, 3)),
        Keep(unit=Address("decoder", 4, "mlp"), inner="expert", indices=(1, 2, 3)),
    ]
    plan = Plan.of(["decoder.0"], keeps=keeps)
    model.save_pretrained(tmp_path / "source", save_original_format=original)
    apply_to_checkpoint(tmp_path / "source", plan, tmp_path / "out")
    apply(model, anatomy, plan).save_pretrained(tmp_path / "expected", save_original_format=original)
    out, expected = (load_file(tmp_path / folder / WEIGHTS) for folder in ("out", "expected"))
    assert out.keys() == expected.keys()
    assert all(torch.equal(out[key], value) for key, value in expected.items())


def test_every_dtype_and_large_tensors_are_cut_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks much smaller than the tensors."""
    monkeypatch.setattr("billhook.surgery.shards._CHUNK", 96)
    model, anatomy = dense("gpt2")
    plan = mixed(anatomy, seed=3)
    for dtype in (torch.bfloat16, torch.float64):
        model.save_pretrained(tmp_path / "source")
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / "source" / WEIGHTS).items()}
        save_file(tensors, tmp_path / "source" / WEIGHTS, {"format": "pt"})
        apply_to_checkpoint(tmp_path / "source", plan, tmp_path / "out", overwrite=True)
        expected = apply(model, anatomy, plan).state_dict()
        for name, tensor in load_file(tmp_path / "out" / WEIGHTS).items():
            assert tensor.dtype == dtype and torch.equal(tensor, expected[name].to(dtype))


def test_a_tensor_in_another_form_is_refused(tmp_path: Path) -> None:
    dense("llama")[0].save_pretrained(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].T.contiguous()
    save_file(tensors, tmp_path / "source" / WEIGHTS, {"format": "pt"})
    plan = Plan.of([], keeps=[Keep(unit=Address("decoder", 1, "mlp"), inner="neuron", indices=(0, 1))])
    with pytest.raises(
        InputError, match=r"up_proj.weight is stored as \[36, 48\], which the model keeps as \[48, 36\]"
    ):
        apply_to_checkpoint(tmp_path / "source", plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner_units": {"decoder": 3}}, "inner_units is not a map of stack"),
        ({"inner_units": {"decoder": {"0": {"mlp": {"expert": 3}}}}}, "gives decoder.0.mlp 3 experts"),
        ({"inner_units": {"decoder": {"0": {"mlp": {"neuron": 0}}}}}, "gives decoder.0.mlp 0 neurons"),
        ({"inner_units": {"decoder": {"9": {"mlp": {"neuron": 3}}}}}, "gives decoder.9.mlp 3 neurons"),
        ({"inner_units": {"decoder": {"0": {"mlp": {"neuron": 99}}}}}, "99 neurons, where its plain values make 48"),
        ({"inner_units": {"decoder": {"0": {"mlp": {"neuron": 3}}}}}, "has shape"),
    ],
)
def test_a_config_that_lists_something_else_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    dense("llama")[0].save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path / "out")
    assert "\n" not in str(caught.value)
