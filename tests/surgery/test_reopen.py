"""Saved and loaded again: every family, every form, the same model as the applied one."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build, params
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from live import drops, generate, inputs_of, logits, stock_load
from safetensors.torch import load_file
from transformers import PreTrainedModel

from billhook import export
from billhook.anatomy import Anatomy, discover
from billhook.models import building
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.surgery import apply
from billhook.surgery.checkpoint import apply_to_checkpoint
from billhook.surgery.reopen import load

few = settings(max_examples=3, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@cache
def dense(name: str) -> tuple[PreTrainedModel, Anatomy]:
    model = build(name)
    return model, discover(model)


def saved(name: str, units: list[Any], out: Path) -> PreTrainedModel:
    """The applied model, after it was saved to ``out``."""
    model, anatomy = dense(name)
    applied = apply(model, anatomy, Plan.of(units))
    with building(out) as folder:
        export.save(applied, anatomy, Plan.of(units), folder)
    return applied


def same(name: str, model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Bit by bit. ``other`` comes from a file, where tensors lie at any address, and some kernels add in an order that
    depends on the address: its weights are moved to where torch itself would put them."""
    for parameter in other.parameters():
        parameter.data = parameter.data.clone()
    for batch, padding in inputs_of(name):
        assert torch.equal(logits(name, model, batch, padding), logits(name, other, batch, padding))
    if FAMILIES[name].generates:
        for a, b in zip(generate(name, model, use_cache=True), generate(name, other, use_cache=True), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", params)
@given(data=st.data())
@few
def test_applied_saved_and_loaded_agree_to_the_bit(name: str, data: st.DataObject) -> None:
    chosen = data.draw(drops(dense(name)[1].outline))
    with tempfile.TemporaryDirectory() as place:
        applied = saved(name, chosen, Path(place) / "out")
        loaded = load(Path(place) / "out").model
        assert type(loaded) is type(applied)
        same(name, applied, loaded)


@pytest.mark.parametrize("name", params)
def test_plain_transformers_gives_the_same_model(name: str, tmp_path: Path) -> None:
    outline = dense(name)[1].outline
    order = [a for a, _ in outline.sublayers()]
    units: list[Address] = []
    for unit in order[:1] + order[1::3]:
        try:
            apply(*dense(name), [*units, unit])
            units.append(unit)
        except InputError:
            continue
    applied = saved(name, units, tmp_path / "out")
    assert (tmp_path / "out" / "modeling_billhook.py").exists() == bool(units)
    same(name, applied, stock_load(tmp_path / "out"))


@pytest.mark.parametrize("name", params)
def test_the_empty_plan_saves_identical_tensors(name: str, tmp_path: Path) -> None:
    model, _ = dense(name)
    model.save_pretrained(tmp_path / "source")
    saved(name, [], tmp_path / "out")
    before, after = (load_file(tmp_path / which / "model.safetensors") for which in ("source", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    texts = [(tmp_path / which / "config.json").read_text() for which in ("source", "out")]
    assert json.loads(texts[0]) == json.loads(texts[1])


@pytest.mark.parametrize("name", ["llama", "gemma3", "bart", "bert", "gemma3_image", "t5"])
def test_a_second_cut_adds_to_the_first(name: str, tmp_path: Path) -> None:
    outline = dense(name)[1].outline
    stack = outline.stacks[-1].name
    first = [Address(stack, 0, "mlp"), Address(stack, 1), Address(stack, 3, "attention")]
    second = [Address(stack, 3), Address(stack, 2, "mlp")]  # in the numbers of what the first cut left
    both = [*first, Address(stack, 3, "mlp"), Address(stack, 4)]
    if len(outline.stacks[-1].blocks) < 5:
        second, both = second[1:], both[:-1]
    saved(name, first, tmp_path / "one")
    once = load(tmp_path / "one").model
    plan = Plan.of(second)
    anatomy = discover(once)
    with building(tmp_path / "two") as folder:
        export.save(apply(once, anatomy, plan), anatomy, plan, folder)
    export.save_checkpoint(tmp_path / "one", plan, tmp_path / "disk")
    at_once = apply(*dense(name), both)
    for out in ("two", "disk"):
        same(name, at_once, load(tmp_path / out).model)
        same(name, at_once, stock_load(tmp_path / out))


def test_no_code_of_the_folder_runs(tmp_path: Path) -> None:
    saved("llama", ["decoder.2.mlp"], tmp_path / "out")
    trap = tmp_path / "trap"
    (tmp_path / "out" / "modeling_billhook.py").write_text(f"open({str(trap)!r}, 'w').close()\nraise SystemExit\n")
    for trusting in (False, True):
        load(tmp_path / "out", trust_remote_code=trusting)
    assert not trap.exists()


def test_dtype_and_flags(tmp_path: Path) -> None:
    saved("llama", ["decoder.2.mlp", "decoder.4"], tmp_path / "out")
    model = load(tmp_path / "out", dtype="bfloat16").model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training and not any(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert model.config.use_cache
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_layer_config": {"1": {"skip": ["nonsense"]}}}, "decoder.1.nonsense"),
        ({"per_layer_config": {"1": {"skip": ["attention"]}}}, "lacks|no place for"),
    ],
)
def test_a_config_that_skips_something_else_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved("llama", ["decoder.2.mlp"], tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=message):
        load(tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ([], "per_layer_config must be an object"),
        ("mlp", "per_layer_config must be an object"),
        ({"a": {"skip": ["mlp"]}}, "per_layer_config.a must have the number of a block"),
        ({"-1": {"skip": ["mlp"]}}, "per_layer_config.-1 must have the number of a block"),
        ({"1": ["mlp"]}, "per_layer_config.1 must be an object"),
        ({"1": None}, "per_layer_config.1 must be an object"),
        ({"1": {"skip": "mlp"}}, "per_layer_config.1.skip must be a list"),
        ({"1": {"skip": {"mlp": 1}}}, "per_layer_config.1.skip must be a list"),
        ({"1": {"skip": [3]}}, "per_layer_config.1.skip must be a list"),
        ({"99": {"skip": ["mlp"]}}, "per_layer_config"),
        ({"1": {"hidden_size": 20}}, "hidden_size"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_an_invalid_per_layer_config_is_one_line_with_file_and_field(
    value: Any, field: str, nested: bool, tmp_path: Path
) -> None:
    dense("gemma3_image" if nested else "llama")[0].save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    content = json.loads(path.read_text())
    (content["text_config"] if nested else content)["per_layer_config"] = value
    path.write_text(json.dumps(content))
    for read in (load, lambda folder: apply_to_checkpoint(folder, Plan.of(["decoder.3"]), tmp_path / "out")):
        with pytest.raises(InputError) as caught:
            read(tmp_path / "model")
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value) and field in str(caught.value)
        if "must" in field:
            assert f"{'text_config.' * nested}{field}" in str(caught.value)


def test_two_stacks_are_told_apart(tmp_path: Path) -> None:
    saved("bart", ["encoder.1.mlp", "decoder.0.cross_attention", "decoder.3"], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["skip_sublayers"] == {"encoder": {"1": ["mlp"]}, "decoder": {"0": ["cross_attention"]}}
    config["skip_sublayers"] = {"encoder": ["mlp"]}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="skip_sublayers is not a map"):
        load(tmp_path / "out")
