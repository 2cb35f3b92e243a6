"""Gates: closed is dropped, open is dense, and slopes are those of the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, VOCABULARY, build

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.measure.ablation import Ablator
from billhook.measure.gates import Gates
from billhook.measure.stand_ins import Adapters, LowRank
from billhook.plan.address import Address
from billhook.plan.check import units
from billhook.plan.errors import InputError

IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(4))
TEXT = Windows.of(IDS, "noise")
ROUTED = ("olmoe", "mixtral", "qwen3_moe", "deepseek_v3")  # a router may turn to another expert in between
SINGLE = [
    name
    for name in FAMILIES
    if [stack.name for stack in discover(build(name)).stacks] == ["decoder"] and discover(build(name)).head
]


def gated(model: Any, unit: str = "sublayer", **fields: Any) -> Gates:
    anatomy = discover(model)
    return Gates(model, anatomy, TEXT, units(anatomy.outline, unit), **fields)


@pytest.mark.parametrize("name", SINGLE)
def test_closed_is_dropped_and_slopes_are_those_of_the_loss(name: str) -> None:
    model = build(name)
    dense = Ablator(model, discover(model), Windows.of(IDS[:1], "first"), "loss")
    for kind in ("block", "sublayer"):
        if not units(discover(model).outline, kind):
            continue
        gates = gated(model, kind)
        assert gates.loss({}, 0) == pytest.approx(dense.value(), abs=1e-5)
        for unit in gates.units[1:3]:
            assert gates.loss({unit: 0.0}, 0) == pytest.approx(dense.at({unit}), abs=1e-5)
    at = dict.fromkeys(gates.units, 0.7)
    value, slopes = gates.slopes(at, 2)  # the third window is the first again
    assert value == pytest.approx(gates.loss(at, 0), abs=1e-5)
    if name not in ROUTED:
        unit, step = gates.units[2], 1e-2
        rise = gates.loss(at | {unit: 0.7 + step}, 0) - gates.loss(at | {unit: 0.7 - step}, 0)
        assert slopes[unit] == pytest.approx(rise / (2 * step), rel=0.05, abs=5e-3)


@pytest.mark.parametrize("kind", ["block", "sublayer"])
@pytest.mark.parametrize("make", [None, LowRank, Adapters])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_what_is_shut_does_not_run(name: str, make: Any, kind: str) -> None:
    model = build(name)
    gates = gated(model, kind, stand_in=make and make(4))
    shut = gates.units[1:4]
    inside = [s for u in shut for s in discover(model).block(u).sublayers if u.sublayer in (None, s.address.sublayer)]
    ran: list[str] = []
    writes = {w.rpartition(".")[0] for s in inside for w in s.writes}
    for path in sorted(writes):
        model.get_submodule(path).register_forward_pre_hook(lambda module, args, path=path: ran.append(path))
    nearly, before = gates.loss(dict.fromkeys(shut, 1e-9), 0), gates.work
    assert ran, "what is let through at all runs"
    ran.clear()
    assert gates.loss(dict.fromkeys(shut, 0.0), 0) == pytest.approx(nearly, abs=1e-5)
    whole = {"block": 3, "sublayer": 1}[kind]
    assert (ran, gates.work - before) == ([], (len(discover(model).stack("decoder").blocks) - whole) * IDS.shape[1])


def test_linears_without_a_module_around_them_run_and_count() -> None:
    gates = gated(build("opt"), "block")
    gates.loss(dict.fromkeys(gates.units[1:4], 0.0), 0)
    assert gates.work == len(discover(gates.model).stack("decoder").blocks) * IDS.shape[1]


def test_the_model_is_left_as_it_was_and_work_is_counted() -> None:
    model = build("llama").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gates = gated(model)
    gates.slopes({gates.units[0]: 0.5}, 0)
    gates.loss({}, 1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert gates.work == (2 + 1) * len(model.model.layers) * IDS.shape[1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "mixtral"])
@pytest.mark.parametrize("kind", ["block", "sublayer"])
@pytest.mark.parametrize("make", [LowRank, Adapters])
def test_a_stand_in_begins_as_nothing_and_learns(make: Any, kind: str, name: str) -> None:
    plain, helped = gated(build(name), kind), gated(build(name), kind, stand_in=make(4), rate=0.02)
    shut = dict.fromkeys(plain.units[2:5], 0.0)
    assert helped.loss(shut, 0) == pytest.approx(plain.loss(shut, 0), abs=1e-5)
    before, *_ = [helped.slopes(shut, 0)[0] for _ in range(8)]
    assert helped.loss(shut, 0) < before - 0.01
    assert plain.loss(shut, 0) == pytest.approx(before, abs=1e-5)


def test_adapters_stand_in_only_for_what_is_shut() -> None:
    helped = gated(build("llama"), "block", stand_in=Adapters(4), rate=0.1)
    unit = helped.units[1]
    for _ in range(4):
        helped.slopes({unit: 0.0}, 0)
    assert helped.loss({}, 0) == pytest.approx(gated(build("llama"), "block").loss({}, 0), abs=1e-5)


def test_damaged_weights_are_refused() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        gated(model).slopes({}, 0)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_models_that_predict_no_next_token_are_refused(name: str) -> None:
    model = build(name)
    anatomy = discover(model)
    with pytest.raises(InputError, match="gates are trained on next tokens"):
        Gates(model, anatomy, TEXT, [Address(anatomy.stacks[0].name, 1)])
