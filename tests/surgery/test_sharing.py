"""Blocks that share the weights of another one: the same however carried out, saved once, undone without a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build, params
from live import assert_cache_is_exact, inputs_of, logits, snapshot
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from billhook.anatomy import Anatomy, discover
from billhook.export.huggingface import save, save_checkpoint
from billhook.heal import average, closed_form
from billhook.measure.cost import CostModel, quantities
from billhook.models import building
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Keep, Plan
from billhook.plan.schedule import Schedule
from billhook.plan.visits import orders, shared
from billhook.surgery import apply, simulate
from billhook.surgery.reopen import load

#: Whose blocks transformers cannot tie, and the reason.
REFUSED = {"gpt2": "transposed", "deepseek_v3": "stored and no parameter", "gemma4": "later blocks read its keys"}
SAVED = {
    "llama": AutoModelForCausalLM,
    "gemma2": AutoModelForCausalLM,
    "qwen3_moe": AutoModelForCausalLM,
    "bert": AutoModelForMaskedLM,
    "t5": AutoModelForSeq2SeqLM,
}


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def folded(anatomy: Anatomy, gone: tuple[str, ...] = ()) -> Plan:
    """The third block of the last stack stands for the fourth too (the second for the third, where there are three)."""
    stack = anatomy.stacks[-1]
    count = len(stack.blocks)
    order = [0, 1, 2, 2, *range(4, count)] if count > 3 else [0, 1, 1]
    return Plan.of(gone, "remote").model_copy(update={"schedule": Schedule.chain(order, stack.name)})


@pytest.mark.parametrize("name", [name for name in params if name not in REFUSED])
def test_simulated_and_applied_agree_and_nothing_is_left_behind(name: str) -> None:
    model = build(name)
    anatomy = discover(model)
    plan = folded(anatomy)
    before = snapshot(model)
    applied = apply(model, anatomy, plan)
    assert snapshot(model) == before
    (moved,) = shared(plan, anatomy.outline)
    gone = anatomy.outline.stack(moved.stack).blocks[moved.block].params
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in applied.parameters()) == gone
    with simulate(model, anatomy, plan):
        for batch, padding in inputs_of(name)[:2]:
            expected = logits(name, model, batch, padding)
            assert torch.equal(logits(name, applied, batch, padding), expected)
    assert snapshot(model) == before
    assert (logits(name, model, *inputs_of(name)[1]) - expected).abs().max() > 1e-3, "sharing changed nothing"


def by_hand(model: Any, plan: Plan, anatomy: Anatomy) -> None:
    """Copy the weights of the leader into the block that is to share them: what sharing has to compute."""
    for new, first in shared(plan, anatomy.outline).items():
        model.get_submodule(anatomy.block(new).path).load_state_dict(
            model.get_submodule(anatomy.block(first).path).state_dict()
        )


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mixtral", "bloom", "bart"])
def test_it_is_the_model_with_the_weights_copied(name: str) -> None:
    """Where blocks differ in nothing but their weights, with a cache of a slot each."""
    model = build(name)
    anatomy = discover(model)
    plan = folded(anatomy)
    applied = apply(model, anatomy, plan)
    ids = assert_cache_is_exact(name, applied)
    by_hand(model, plan, anatomy)
    for batch, padding in inputs_of(name):
        torch.testing.assert_close(logits(name, applied, batch, padding), logits(name, model, batch, padding))
    assert torch.equal(ids[0], assert_cache_is_exact(name, model)[0])


@pytest.mark.parametrize(("name", "auto"), SAVED.items())
def test_saved_once_and_loaded_by_everyone(name: str, auto: Any, tmp_path: Path) -> None:
    """With a block gone and one that shares narrower and without a sublayer; from memory and on disk."""
    model = build(name)
    anatomy = discover(model)
    stack = anatomy.stacks[-1].name
    plan = folded(anatomy)
    leader = next(iter(shared(plan, anatomy.outline).values()))
    unit = Address(stack, leader.block, "mlp")
    kinds = [inner for inner in anatomy.inner.get(unit, ()) if inner.kind == "neuron"]
    keeps = [Keep(unit=unit, inner="neuron", indices=tuple(range(inner.count // 2))) for inner in kinds]
    drops = [Address(stack, leader.block, "attention")] if name == "llama" else []
    plan = plan.model_copy(update={"edits": Plan.of(drops, keeps=keeps).edits})
    small = apply(model, anatomy, plan)
    expected = logits(name, small, 2, None)
    with building(tmp_path / "dense", False) as folder:
        model.save_pretrained(folder)
    with building(tmp_path / "live", False) as folder:
        save(small, anatomy, plan, folder)
    save_checkpoint(tmp_path / "dense", plan, tmp_path / "disk")
    files = []
    for folder in (tmp_path / "live", tmp_path / "disk"):
        with safe_open(folder / "model.safetensors", "pt") as stored:
            files.append({key: stored.get_tensor(key) for key in stored.keys()})  # noqa: SIM118
        again = load(folder).model
        torch.testing.assert_close(logits(name, again, 2, None), expected, atol=0, rtol=0)
        assert len({id(p) for p in again.parameters()}) == len({id(p) for p in small.parameters()})
        other = auto.from_pretrained(folder, trust_remote_code=True)
        other.eval()
        torch.testing.assert_close(logits(name, other, 2, None), expected, atol=1e-6, rtol=1e-6)
        with pytest.raises(InputError, match="share weights already"):
            apply(again, discover(again), [Address(stack, 1, "mlp")])
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert sum(tensor.numel() for tensor in files[0].values()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_what_cannot_be_tied_is_refused_and_the_model_is_untouched(name: str, reason: str) -> None:
    model = build(name)
    anatomy = discover(model)
    before = snapshot(model)
    with pytest.raises(InputError, match=reason), simulate(model, anatomy, folded(anatomy)):
        pass
    assert snapshot(model) == before


def test_a_file_that_shares_what_is_not_there_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    anatomy = discover(model)
    plan = folded(anatomy)
    with building(tmp_path / "out", False) as folder:
        save(apply(model, anatomy, plan), anatomy, plan, folder)
    path = tmp_path / "out" / "config.json"
    content = json.loads(path.read_text())
    assert content["shared_blocks"] == {"decoder": {"3": 2}}
    wrong = [{"decoder": blocks} for blocks in ({"3": 4}, {"9": 2}, {"3": 2, "2": 1})]
    for odd in (*wrong, [1], {"encoder": {"1": 0}}):
        path.write_text(json.dumps(content | {"shared_blocks": odd}))
        with pytest.raises(InputError, match=r"cannot have the weights of|is not a map"):
            load(tmp_path / "out")


def test_parameters_and_bytes_fall_and_nothing_else() -> None:
    model = build("llama")
    anatomy = discover(model)
    plan = folded(anatomy, ("decoder.4",))
    plan = plan.model_copy(update={"schedule": Schedule.chain([0, 1, 2, 2])})
    order = orders(plan, anatomy.outline)["decoder"]
    assert order == [0, 1, 2, 2]
    costs = quantities(
        anatomy.outline, [Address("decoder", 3), Address("decoder", 4)], (), again=[Address("decoder", 2)]
    )
    model_costs = CostModel(anatomy.outline)
    one, two = (model_costs.of([Address("decoder", i) for i in gone]) for gone in ((4,), (3, 4)))
    held = costs.pop("memory").compressed  # the weights of three blocks, and the cache of four
    assert held == pytest.approx(two["size"] + one["memory"] - one["size"])
    for kind, cost in costs.items():
        assert cost.compressed == pytest.approx((two if kind in ("params", "size") else one)[kind]), kind


def test_such_a_model_is_not_healed() -> None:
    model = build("llama")
    anatomy = discover(model)
    for way, more in ((closed_form, [[FAMILIES["llama"].inputs(model, 4, None)]]), (average, [])):
        with pytest.raises(InputError, match="share weights or run in another order"):
            way(model, anatomy, folded(anatomy), *more)
