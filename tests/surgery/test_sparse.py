"""The promises of surgery for single weights, on every family."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build, params
from live import inputs_of, logits, snapshot
from safetensors.torch import load_file
from sparsified import sparse
from test_width_saved import mixed, same, saved, stock_load
from transformers import PreTrainedModel

from billhook import export
from billhook.anatomy import Anatomy, discover
from billhook.anatomy.linears import linears
from billhook.measure.cost import cost
from billhook.plan.address import Address
from billhook.plan.arrays import Arrays
from billhook.plan.errors import InputError
from billhook.plan.masks import pack
from billhook.plan.plan import Plan, Sparsify
from billhook.plan.target import Target
from billhook.surgery import apply, simulate
from billhook.surgery.masks import zeros_left
from billhook.surgery.reopen import load


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@cache
def dense(name: str) -> tuple[PreTrainedModel, Anatomy]:
    model = build(name)
    return model, discover(model)


def zeros(model: PreTrainedModel, anatomy: Anatomy) -> int:
    found = [
        linear.name
        for s in anatomy.stacks
        for b in s.blocks
        for u in b.sublayers
        for linear in linears(model, u, b.path)
    ]
    return sum(int((model.get_parameter(name) == 0).sum()) for name in found)


@pytest.mark.parametrize("name", params)
def test_simulated_applied_saved_and_cut_on_disk_agree(name: str) -> None:
    """With a block and a sublayer dropped and the rest narrowed where that is possible."""
    model, anatomy = dense(name)
    wide = mixed(anatomy, seed=3)
    plan = sparse(model, anatomy, 4, wide.drops, wide.keeps)
    before = snapshot(model)
    applied = apply(model, anatomy, plan)
    assert snapshot(model) == before
    with simulate(model, anatomy, plan) as simulated:
        for batch, padding in inputs_of(name)[-1:]:
            assert torch.equal(logits(name, simulated, batch, padding), logits(name, applied, batch, padding))
    assert snapshot(model) == before
    left = zeros_left(plan, anatomy, model, wide.keeps)
    assert sum(left.values()) == zeros(applied, discover(applied)) > 0
    predicted = cost(anatomy.outline, plan.drops, plan.keeps, left)
    assert cost(anatomy.outline, plan.drops, plan.keeps)["params"] - predicted["params"] == sum(left.values())
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        saved(model, plan, root / "memory")
        same(name, applied, load(root / "memory").model)
        model.save_pretrained(root / "source")
        export.save_checkpoint(root / "source", plan, root / "disk")
        memory, disk = (load_file(root / folder / "model.safetensors") for folder in ("memory", "disk"))
        assert memory.keys() == disk.keys()
        assert all(torch.equal(disk[key], value) for key, value in memory.items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "vit"])
def test_zeros_alone_are_an_ordinary_checkpoint(name: str, tmp_path: Path) -> None:
    model, anatomy = dense(name)
    plan = sparse(model, anatomy, 5, target=Target.UNIFORM)
    applied = saved(model, plan, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.py"))
    same(name, applied, stock_load(tmp_path / "out"))


def test_what_goes_are_the_weights_of_the_mask() -> None:
    model, anatomy = dense("gpt2")
    unit = Address("decoder", 1, "mlp")
    weight = model.get_parameter("transformer.h.1.mlp.c_fc.weight")
    mask = np.ones(tuple(weight.shape), bool)
    mask[3, 5] = mask[31, 120] = False
    edit = Sparsify(unit=unit, zeros={"mlp.c_fc.weight": 2})
    plan = Plan.of([], sparsities=[edit], arrays=Arrays({edit.array("mlp.c_fc.weight"): pack(mask)}))
    new = apply(model, anatomy, plan).get_parameter("transformer.h.1.mlp.c_fc.weight")
    assert [tuple(place) for place in (new != weight).nonzero().tolist()] == [(3, 5), (31, 120)]
    assert new[3, 5] == new[31, 120] == 0


def test_an_exception_inside_a_simulation_leaves_no_trace() -> None:
    model, anatomy = dense("llama")
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="on purpose"), simulate(model, anatomy, sparse(model, anatomy, 1)):
        assert snapshot(model) != before
        raise RuntimeError("on purpose")
    assert snapshot(model) == before


def _one(zeros: int = 1, pattern: str = "unstructured", unit: str = "decoder.1.mlp", **mask: Any) -> Plan:
    """One sparsify of gate_proj [48, 36] in the tiny Llama."""
    edit = Sparsify(unit=unit, pattern=pattern, zeros={"mlp.gate_proj.weight": zeros})
    kept = np.ones((48, 36), bool)
    kept[0, :zeros] = False
    arrays = {edit.array("mlp.gate_proj.weight"): mask.get("packed", pack(kept))}
    return Plan.of([], sparsities=[edit], arrays=Arrays({} if mask.get("absent") else arrays))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (_one(unit="decoder.9.mlp"), "decoder.9.mlp is no sublayer"),
        (_one(unit="decoder.1.attention"), "decoder.1.attention has no linear mlp.gate_proj.weight; it has self_attn"),
        (_one(absent=True), "decoder.1.mlp/mlp.gate_proj.weight, which is not in the file"),
        (_one(packed=pack(np.ones((48, 48), bool))), "does not fit a weight of shape"),
        (_one(zeros=2, packed=pack(np.ones((48, 36), bool))), "has 0 zeros, where the plan says 2"),
        (_one(zeros=1, pattern="2:4"), "does not keep to the pattern 2:4"),
        (_one(pattern="4:2"), "neither unstructured nor of the form N:M"),
        (Plan.of(["decoder.1"], sparsities=_one().sparsities, arrays=_one().arrays), "both dropped and made sparse"),
        (Plan.of([], sparsities=_one().sparsities * 2, arrays=_one().arrays), "sparse twice"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_one_line(plan: Plan, message: str) -> None:
    model, anatomy = dense("llama")
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        apply(model, anatomy, plan)


def test_a_plan_file_carries_its_masks(tmp_path: Path) -> None:
    model, anatomy = dense("llama")
    plan = sparse(model, anatomy, 2)
    plan.write(tmp_path / "plan.json")
    read = Plan.read(tmp_path / "plan.json")
    assert read == plan
    one, other = (apply(model, anatomy, p).state_dict() for p in (plan, read))
    assert all(torch.equal(one[key], other[key]) for key in one)
