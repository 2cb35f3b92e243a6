"""The promises of surgery for linears in two parts, on every family and in every form."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from apart import plan_of
from families import FAMILIES, build, params
from live import assert_cache_is_exact, generate, inputs_of, logits, possible, snapshot, stock_load
from safetensors.torch import load_file
from transformers import PreTrainedModel

from billhook import export
from billhook.anatomy import Anatomy, discover
from billhook.measure.cost import cost
from billhook.models import building
from billhook.plan.address import Address
from billhook.plan.plan import Plan
from billhook.surgery import apply, simulate
from billhook.surgery.reopen import load

WEIGHTS = "model.safetensors"
UNIT = Address("decoder", 1, "mlp")


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@cache
def dense(name: str) -> tuple[PreTrainedModel, Anatomy]:
    """One model a family for the whole file: every test has to leave it as it was."""
    model = build(name)
    return model, discover(model)


def mixed(anatomy: Anatomy, seed: int) -> Plan:
    """A sublayer and a block dropped where that is possible, most linears of the others in two."""
    gone: list[Address] = []
    for stack in anatomy.outline.stacks:
        for unit in (Address(stack.name, 1, "attention"), Address(stack.name, 2, "mlp"), Address(stack.name, 3)):
            if possible([*gone, unit], anatomy.outline):
                gone.append(unit)
    return plan_of(anatomy, seed, gone)


def same(name: str, model: PreTrainedModel, other: PreTrainedModel) -> None:
    for parameter in other.parameters():
        parameter.data = parameter.data.clone()
    for batch, padding in inputs_of(name)[-1:]:
        assert torch.equal(logits(name, model, batch, padding), logits(name, other, batch, padding))


@pytest.mark.parametrize("name", params)
def test_simulated_applied_saved_reopened_and_cut_on_disk_agree(name: str) -> None:
    model, anatomy = dense(name)
    plan = mixed(anatomy, seed=params.index(name))
    assert plan.factors
    before = snapshot(model)
    applied = apply(model, anatomy, plan)
    assert snapshot(model) == before
    with simulate(model, anatomy, plan) as simulated:
        for batch, padding in inputs_of(name):
            expected = logits(name, simulated, batch, padding)
            assert torch.isfinite(expected).all()
            assert torch.equal(logits(name, applied, batch, padding), expected)
        if FAMILIES[name].generates:
            assert all(
                map(torch.equal, generate(name, applied, use_cache=True), assert_cache_is_exact(name, simulated))
            )
    assert snapshot(model) == before
    gone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in applied.parameters())
    predicted = cost(anatomy.outline, plan.drops, factors=plan.factors)
    assert gone == cost(anatomy.outline)["params"] - predicted["params"]
    redrawn = cost(discover(applied).outline)
    assert redrawn["flops"] == pytest.approx(predicted["flops"])
    assert redrawn["kv_bytes"] == pytest.approx(predicted["kv_bytes"])

    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        with building(root / "memory") as folder:
            export.save(applied, anatomy, plan, folder)
        loaded = load(root / "memory").model
        assert type(loaded) is type(applied)
        same(name, applied, loaded)
        same(name, applied, stock_load(root / "memory"))
        model.save_pretrained(root / "source")
        export.save_checkpoint(root / "source", plan, root / "disk")
        memory, disk = (load_file(root / folder / WEIGHTS) for folder in ("memory", "disk"))
        assert memory.keys() == disk.keys()
        assert all(torch.equal(disk[key], value) for key, value in memory.items())
        for text in ("config.json", "modeling_billhook.py"):
            assert (root / "disk" / text).read_text() == (root / "memory" / text).read_text(), text
