"""Experts that are merged: exact where the definition is, the same model live and on disk, and nearer than dropping."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build

from billhook.anatomy import discover
from billhook.anatomy.mixtures import mixture_of, neuron_axes, neuron_values
from billhook.data import Windows
from billhook.export.huggingface import save
from billhook.heal import healed, merge
from billhook.heal.combining.alike import aligned, averaged, grouped
from billhook.heal.judge import divergences
from billhook.measure.routing import Routing
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import HiddenChannels, Keep, Plan
from billhook.surgery import apply, simulate
from billhook.surgery.reopen import load

MIXTURES = {"mixtral": (1, 2), "qwen3_moe": (0, 3, 4), "olmoe": (0, 2, 5, 7), "deepseek_v3": tuple(range(8))}
WINDOWS = Windows.of(torch.randint(3, 90, (16, 12), generator=torch.Generator().manual_seed(5)), "test")


def plan_of(name: str, anatomy: Any, blocks: tuple[int, ...] = (1, 2, 4)) -> Plan:
    kept = MIXTURES[name]
    return Plan.of(
        [],
        keeps=[
            Keep(unit=a, inner="expert", indices=kept)
            for a, units in anatomy.inner.items()
            for u in units
            if u.kind == "expert" and a.block in blocks
        ],
    )


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
@torch.no_grad()
def test_simulated_applied_and_reloaded_agree(name: str, tmp_path: Path) -> None:
    model = build(name)
    anatomy = discover(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = plan_of(name, anatomy)
    found = merge(model, anatomy, plan, WINDOWS)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    inputs = FAMILIES[name].inputs(model, 3, "left")
    with healed(model, found):
        applied = apply(model, anatomy, plan)
        with simulate(model, anatomy, plan):
            expected = model(**inputs).logits
    assert torch.equal(applied(**inputs).logits, expected)
    save(applied, anatomy, plan, tmp_path / "out")
    again = load(tmp_path / "out").model
    torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(apply(model, anatomy, plan)(**inputs).logits, expected, atol=1e-3)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
@torch.no_grad()
def test_what_is_kept_is_nearer_on_text_that_no_fit_saw(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    module = importlib.import_module("billhook.heal.combining.merge")
    monkeypatch.setattr(module, "divergence", lambda *_: [1.0, 0.5])  # what the whole model gains is another test's
    anatomy = discover(model)
    found = merge(model, anatomy, plan_of(name, anatomy), WINDOWS)
    assert all(refit.after < refit.before for refit in found.refits if refit.taken)
    assert any(refit.taken and "down" in refit.weight for refit in found.refits)
    assert all(refit.after == refit.before for refit in found.refits if not refit.taken)
    assert not found.left_alone and found.work > 0 and found.tokens == WINDOWS.tokens


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
@torch.no_grad()
def test_refits_stay_only_where_the_whole_model_gains(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("billhook.heal.combining.merge")
    model = build(name)
    anatomy = discover(model)
    plan = plan_of(name, anatomy)
    found = merge(model, anatomy, plan, WINDOWS)
    with monkeypatch.context() as without:
        without.setattr(module, "solve", lambda *_: None)
        plain = merge(model, anatomy, plan, WINDOWS)
    was, now = divergences(model, anatomy, plan, [plain, found], WINDOWS.ids[14:])
    assert (now < was) == any(refit.taken for refit in found.refits)
    monkeypatch.setattr(module, "divergence", lambda *_: [1.0, 1.0])
    undone = merge(model, anatomy, plan, WINDOWS)
    assert undone.tensors.keys() == plain.tensors.keys()
    assert all(torch.equal(undone.tensors[key], tensor) for key, tensor in plain.tensors.items())
    assert undone.refits and not any(refit.taken or refit.after < refit.before for refit in undone.refits)


@torch.no_grad()
def test_copies_of_one_expert_are_merged_without_loss() -> None:
    """Every expert is one of two with its neurons shuffled: two are enough."""
    model = build("mixtral")
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        experts, router = layer.mlp.experts, layer.mlp.gate
        inner = experts.down_proj.shape[2]
        for twin, original in ((2, 0), (3, 1)):
            order = torch.randperm(inner, generator=generator)
            experts.gate_up_proj[twin] = experts.gate_up_proj[original][torch.cat([order, order + inner])]
            experts.down_proj[twin] = experts.down_proj[original][:, order]
            router.weight[twin] = router.weight[original]
    anatomy = discover(model)
    plan = Plan.of(
        [], keeps=[Keep(unit=a, inner="expert", indices=(0, 1)) for a in anatomy.inner if a.sublayer == "mlp"]
    )
    found = merge(model, anatomy, plan, WINDOWS)
    for name, tensor in found.tensors.items():
        if name.endswith("gate_up_proj"):  # the mean of aligned copies is the original
            torch.testing.assert_close(tensor[:2], model.get_parameter(name)[:2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"])
@torch.no_grad()
def test_an_aligned_expert_computes_the_same_and_lies_nearer(name: str) -> None:
    model = build(name)
    anatomy = discover(model)
    (inner,) = anatomy.inner[Address("decoder", 2, "mlp")]
    mixture = mixture_of(inner)
    axes = neuron_axes(model, mixture)
    own, other = ({n: model.get_parameter(n)[e].clone() for n in mixture.tensors} for e in (1, 0))
    turned = aligned(own, other, axes)
    module = model.get_submodule(mixture.experts)
    x = torch.randn(5, module.down_proj.shape[1], generator=torch.Generator().manual_seed(1))
    down = next(n for n in mixture.tensors if "down" in n)
    expected = neuron_values(module, 1, x) @ own[down].T
    one = torch.zeros(5, 1, dtype=torch.long)
    torch.testing.assert_close(module(x, one + 1, torch.ones(5, 1)), expected, atol=1e-5, rtol=1e-5)
    for n, tensor in turned.items():
        module.get_parameter(n.rpartition(".")[2])[1] = tensor
    torch.testing.assert_close(module(x, one + 1, torch.ones(5, 1)), expected, atol=1e-5, rtol=1e-5)
    off = [sum((side[n] - other[n]).square().sum() for n in own) for side in (own, turned)]
    assert off[1] < off[0]


def test_groups_and_their_mean() -> None:
    """Two directions of logits; expert 4, which stays, was never picked, so that nobody joins it."""
    logits = torch.tensor([[1.0, 0.9, -1.0, -0.8, 0.95], [0.5, 0.6, -0.7, -0.3, 0.55], [0.1, 0.0, 0.4, 0.5, 0.05]])
    routed = Routing.of(logits, torch.tensor([[0, 1], [0, 1], [0, 3]]))
    groups = grouped(routed, (0, 3, 4))
    assert groups == {0: [0, 1], 3: [3, 2], 4: [4]}
    tensors = {"up": torch.arange(10.0).reshape(5, 1, 2), "down": torch.ones(5, 2, 1)}
    found = averaged(tensors, {"up": (0, 1), "down": (1, 1)}, groups, routed.slots)
    assert found["up"][0].tolist() == [[pytest.approx(0.6 * 0 + 0.4 * 2), pytest.approx(0.6 * 1 + 0.4 * 3)]]
    assert torch.equal(found["up"][3:], tensors["up"][3:])  # expert 2 was never picked and has no weight
    assert grouped(Routing.of(logits, torch.tensor([[1], [1], [1]])), (0, 3)) == {0: [0, 1, 4], 3: [3, 2]}


def test_what_is_refused() -> None:
    model = build("mixtral")
    anatomy = discover(model)
    keep = Keep(unit=Address("decoder", 1, "mlp"), inner="expert", indices=(0, 1))
    with pytest.raises(InputError, match="takes away experts"):
        merge(model, anatomy, Plan.of(["decoder.3"], keeps=[keep]), WINDOWS)
    with pytest.raises(InputError, match="takes away experts"):
        merge(model, anatomy, Plan.of([]), WINDOWS)
    with pytest.raises(InputError, match="at least two windows"):
        merge(model, anatomy, Plan.of([], keeps=[keep]), Windows.of(WINDOWS.ids[:1], "one"))
    thinner = HiddenChannels(stack="decoder", indices=tuple(range(8)))
    with pytest.raises(InputError, match="hidden channels go by closed-form"):
        merge(model, anatomy, Plan.of([], keeps=[keep], channels=[thinner]), WINDOWS)
    llama = build("llama")
    neurons = Keep(unit=Address("decoder", 1, "mlp"), inner="neuron", indices=(0, 1))
    with pytest.raises(InputError, match="takes away experts"):
        merge(llama, discover(llama), Plan.of([], keeps=[neurons]), WINDOWS)
