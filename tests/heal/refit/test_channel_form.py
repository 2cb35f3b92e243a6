"""Healing in closed form where hidden channels are gone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import VOCABULARY, build
from torch import Tensor

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.heal import closed_form, healed
from billhook.heal.refit.bias import bias_compensation
from billhook.heal.refit.widths import whole
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import HiddenChannels, Keep, Plan
from billhook.surgery import apply

IDS = torch.randint(3, VOCABULARY, (64, 24), generator=torch.Generator().manual_seed(4))
WINDOWS = Windows.of(IDS, "noise")


def kept(count: int, left: int) -> HiddenChannels:
    return HiddenChannels(stack="decoder", indices=tuple(range(count - left, count)))


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "cohere"])
def test_the_healed_model_is_nearer_to_the_dense_one(name: str) -> None:
    model: Any = build(name)
    anatomy = discover(model)
    count = anatomy.outline.stacks[0].hidden_size
    plan = Plan.of([Address("decoder", 2)], channels=[kept(count, count - 8 if name != "llama" else 30)])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    healing = closed_form(model, anatomy, plan, WINDOWS)
    assert healing.healed is not None and healing.cut is not None and healing.healed < 0.95 * healing.cut
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    names = dict(model.named_parameters(remove_duplicate=False))
    assert healing.tensors and all(names[key].shape == value.shape for key, value in healing.tensors.items())
    with healed(model, healing):
        small = apply(model, anatomy, plan)
    again = closed_form(model, anatomy, plan, WINDOWS)
    assert all(torch.equal(again.tensors[key], value) for key, value in healing.tensors.items())
    with torch.no_grad():
        cut = apply(model, anatomy, plan)
        dense = model(input_ids=IDS[-8:]).logits.log_softmax(-1)
        far, near = (divergence(dense, m(input_ids=IDS[-8:]).logits) for m in (cut, small))
    assert near == pytest.approx(healing.healed, rel=1e-3) and far == pytest.approx(healing.cut, rel=1e-3)


def divergence(log_p: Tensor, logits: Tensor) -> float:
    return float((log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1).mean())


def test_a_model_that_puts_out_the_stream_is_judged_by_the_channels_that_stay() -> None:
    built: Any = build("gemma3")
    model = built.model
    anatomy = discover(model)
    plan = Plan.of([], channels=[kept(32, 24)])
    padded = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    padded["attention_mask"][:, :5] = 0
    healing = closed_form(model, anatomy, plan, [padded])
    with healed(model, healing):
        small = apply(model, anatomy, plan)
    batch = {name: value[-8:] for name, value in padded.items()}
    with torch.no_grad():
        dense, far, near = (m(**batch)[0][:, 5:] for m in (model, apply(model, anatomy, plan), small))
    errors = [
        ((other - dense[..., 8:]).square().sum(-1) / dense[..., 8:].square().sum(-1)).mean() for other in (far, near)
    ]
    assert [healing.cut, healing.healed] == pytest.approx([float(error) for error in errors], rel=1e-3)
    assert errors[1] < errors[0]


def test_reads_take_a_channel_off_the_others_that_hold_it() -> None:
    """Channel 5 is written as channel 4 everywhere: the closed form has nothing to lose without it."""
    model: Any = build("qwen3")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] = model.model.embed_tokens.weight[:, 4]
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[5] = layer.self_attn.o_proj.weight[4]
            layer.mlp.down_proj.weight[5] = layer.mlp.down_proj.weight[4]
        model.lm_head.weight[:, 5] = 0
    anatomy = discover(model)
    plan = Plan.of([], channels=[HiddenChannels(stack="decoder", indices=tuple(i for i in range(32) if i != 5))])
    healing = closed_form(model, anatomy, plan, WINDOWS)
    assert healing.healed < 0.3 * healing.cut  # type: ignore[operator]


def test_tensors_of_the_cut_model_go_back_into_those_of_the_original() -> None:
    """Norm weights included, which the cut scales; with neurons gone as well."""
    model = build("gemma3")
    anatomy = discover(model)
    keep = Keep(unit=Address("decoder", 1, "mlp"), inner="neuron", indices=tuple(range(3, 40)))
    plan = Plan.of([], keeps=[keep], channels=[kept(32, 24)])
    small = dict(apply(model, anatomy, plan).named_parameters())
    noisy = {name: value + 0.1 for name, value in small.items() if name.startswith("model.layers.1.")}
    tensors = whole(model, anatomy, [keep], noisy, plan.channels)
    names = dict(model.named_parameters())
    assert all(names[name].shape == value.shape for name, value in tensors.items())
    with torch.no_grad():
        for name, value in tensors.items():
            names[name].copy_(value)
    for name, value in apply(model, anatomy, plan).named_parameters():
        torch.testing.assert_close(value, noisy.get(name, small[name]), atol=1e-6, rtol=1e-6)


def test_other_ways_to_heal_refuse_hidden_channels() -> None:
    model = build("llama")
    with pytest.raises(InputError, match="hidden channels go by closed-form"):
        bias_compensation(model, discover(model), Plan.of([], channels=[kept(36, 30)]), WINDOWS)
