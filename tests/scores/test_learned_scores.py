"""Scores of width that try each unit, or look through adapters: against both written out."""

from __future__ import annotations

import pytest
import torch
from families import build

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.measure import lora_slopes as adapters
from billhook.measure.knockout import knockout
from billhook.measure.lora_slopes import lora_slopes
from billhook.measure.width import WidthTrace, units_of
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.recipes.catalogue import load
from billhook.recipes.schema import Recipe
from billhook.scores import named

WINDOWS = Windows.of(torch.randint(3, 90, (3, 10), generator=torch.Generator().manual_seed(3)), "test")
ATTENTION, MLP = Address("decoder", 2, "attention"), Address("decoder", 2, "mlp")


@pytest.mark.parametrize("by", ["zero", "interchange"])
@torch.no_grad()
def test_a_knockout_is_the_divergence_of_the_model_without(by: str) -> None:
    model = build("llama")
    anatomy = discover(model)
    units = units_of(anatomy, "group", [ATTENTION])
    found = knockout(model, anatomy, units, WINDOWS, by)[ATTENTION]
    named("knockout")(WidthTrace.of(model, units, knockouts={ATTENTION: found}), anatomy, by=by)
    plain = model(WINDOWS.ids).logits.log_softmax(-1)
    width = 20  # two heads of ten channels read each key head
    for group in range(3):
        own = slice(group * width, (group + 1) * width)

        def change(module, args, own=own):
            x = args[0].clone()
            x[..., own] = 0 if by == "zero" else torch.cat([x[-1:, :, own], x[:-1, :, own]])
            return (x,)

        handle = model.model.layers[2].self_attn.o_proj.register_forward_pre_hook(change)
        other = model(WINDOWS.ids).logits.log_softmax(-1)
        handle.remove()
        expected = (plain.exp() * (plain - other)).sum(-1).mean().item()
        assert found[group].item() == pytest.approx(expected, rel=1e-3)


def test_a_knockout_takes_text_to_swap_with_and_few_units() -> None:
    model = build("llama")
    anatomy = discover(model)
    units = units_of(anatomy, "group", [ATTENTION])
    with pytest.raises(InputError, match="two windows"):
        knockout(model, anatomy, units, Windows.of(WINDOWS.ids[:1], "one"))
    with pytest.raises(ValueError, match="unit must be group"):
        Recipe.model_validate({**load("interchange-heads").model_dump(), "unit": "neuron"})


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_the_first_look_through_adapters_is_the_slope_behind_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While B is 0 the guess of dL/dW is (dL/dW) A' A; with as many ranks as inputs and A orthogonal it is exact."""
    model = build(name)
    anatomy = discover(model)
    units = units_of(anatomy, "width", [MLP])
    (weight,) = (s.parameter for s in units[MLP].slices if s.writes)
    matrix = model.get_parameter(weight)
    inputs = matrix.shape[0] if name == "gpt2" else matrix.shape[1]
    monkeypatch.setattr(adapters, "RANK", inputs)
    monkeypatch.setattr(torch, "randn", lambda *shape, generator=None: torch.eye(*shape) * shape[1] ** 0.5)
    one = Windows.of(WINDOWS.ids[:1], "one")
    found = lora_slopes(model, anatomy, units, one)[weight]
    monkeypatch.undo()
    logits = model(one.ids).logits[0, :-1]
    slope = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, one.ids[0, 1:]), matrix)[0]
    torch.testing.assert_close(found, (slope * matrix).square().detach(), rtol=1e-3, atol=1e-10)
    before = matrix.detach().clone()
    trace = WidthTrace(units, lora_slopes(model, anatomy, units, WINDOWS))
    scores = named("lora-importance")(trace, anatomy)[MLP]
    assert scores.shape == (units[MLP].count,) and scores.isfinite().all() and (scores > 0).all()
    assert torch.equal(matrix, before) and not matrix.grad
