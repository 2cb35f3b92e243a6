"""Slopes of inner units, against gates that are really turned."""

from __future__ import annotations

import pytest
import torch
from families import build

from billhook.anatomy import discover
from billhook.anatomy.types import Inner, Slice
from billhook.data import Windows
from billhook.measure.sensitivity import sensitivity
from billhook.plan.address import Address
from billhook.plan.errors import InputError

IDS = torch.randint(3, 90, (3, 10), generator=torch.Generator().manual_seed(3))
WINDOWS = Windows.of(IDS, "test")
MLP, ATTENTION = Address("decoder", 2, "mlp"), Address("decoder", 1, "attention")


def units(model) -> dict[Address, Inner]:
    layers = model.model.layers
    config = model.config
    width = config.num_attention_heads // config.num_key_value_heads * layers[1].self_attn.head_dim
    down = Slice("model.layers.2.mlp.down_proj.weight", 1, writes=True)
    o = Slice("model.layers.1.self_attn.o_proj.weight", 1, width=width, writes=True)
    return {
        MLP: Inner("neuron", config.intermediate_size, (down,)),
        ATTENTION: Inner("group", config.num_key_value_heads, (o,)),
    }


def gated(model, linear, gate: torch.Tensor, answer: str) -> torch.Tensor:
    """The sum over tokens of the answer in float64, with the linear's input times a gate [tokens of the batch,
    inputs]."""
    handle = linear.register_forward_pre_hook(lambda m, args: (args[0] * gate,))
    log_p = model(input_ids=IDS, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    handle.remove()
    if answer == "entropy":
        return -(log_p.exp() * log_p).sum()
    return -log_p.gather(-1, IDS[:, 1:, None]).sum()


@pytest.mark.parametrize("answer", ["loss", "entropy"])
def test_slopes_are_derivatives_of_gates(answer: str) -> None:
    model = build("llama").double()
    anatomy = discover(model)
    chosen = units(model)
    found = sensitivity(model, anatomy, chosen, WINDOWS, answer)
    for address, linear in (
        (MLP, model.model.layers[2].mlp.down_proj),
        (ATTENTION, model.model.layers[1].self_attn.o_proj),
    ):
        gate = torch.ones(*IDS.shape, linear.in_features, dtype=torch.float64, requires_grad=True)
        (slopes,) = torch.autograd.grad(gated(model, linear, gate, answer), gate)
        a = slopes.unflatten(-1, (chosen[address].count, -1)).sum(-1)
        expected = {
            "total": a.sum((0, 1)),
            "absolute": a.abs().sum((0, 1)),
            "squares": a.square().sum((0, 1)),
            "texts": a.sum(1).abs().sum(0),
        }
        assert found[address].count == IDS.numel()
        for name, value in expected.items():
            torch.testing.assert_close(getattr(found[address], name), value, rtol=1e-4, atol=1e-5)


def test_texts_add_up_and_padding_does_not_count() -> None:
    model = build("llama")
    anatomy = discover(model)
    whole = sensitivity(model, anatomy, units(model), WINDOWS)
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), IDS], 1)
    mask = (torch.arange(12) >= 2).long().expand(3, 12)
    parts = [
        sensitivity(model, anatomy, units(model), [{"input_ids": padded[i], "attention_mask": mask[i]}])
        for i in (slice(0, 1), slice(1, 3))
    ]
    for address, slopes in whole.items():
        sum_ = parts[0][address] + parts[1][address]
        assert sum_.count == slopes.count
        for name in ("total", "absolute", "squares", "texts"):
            torch.testing.assert_close(getattr(sum_, name), getattr(slopes, name), rtol=1e-3, atol=1e-5)


def test_sampled_slopes_are_those_of_the_model_itself() -> None:
    """Drawn anew and again, the mean slope goes to zero (the expected score of a model is), the loss's does not."""
    model = build("llama")
    anatomy = discover(model)
    draws = [sensitivity(model, anatomy, units(model), WINDOWS, "sampled", seed=s)[MLP] for s in range(12)]
    mean = sum(d.total for d in draws) / len(draws)
    spread = sum((d.total - mean).square() for d in draws) / len(draws)
    assert mean.square().mean() < 0.4 * spread.mean()
    again = sensitivity(model, anatomy, units(model), WINDOWS, "sampled", seed=0)[MLP]
    assert torch.equal(again.squares, draws[0].squares)


def test_frozen_weights_change_nothing() -> None:
    model = build("llama")
    free = sensitivity(model, discover(model), units(model), WINDOWS)[MLP]
    model.requires_grad_(False)
    assert torch.equal(free.squares, sensitivity(model, discover(model), units(model), WINDOWS)[MLP].squares)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_language_model() -> None:
    model = build("vit")
    with pytest.raises(InputError, match="language model"):
        sensitivity(model, discover(model), {}, WINDOWS)
