"""The damage of each unit alone, and the objective that a search minimises."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from families import FAMILIES, build

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.measure.ablation import Ablator, Kind, ablation
from billhook.plan.address import Address
from billhook.plan.check import units
from billhook.surgery import simulate

WINDOWS = Windows.of(torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(2)), "test")


@pytest.mark.parametrize("kind", get_args(Kind))
def test_the_objective_follows_the_state(kind: str) -> None:
    model = build("llama")
    ablator = Ablator(model, discover(model), WINDOWS, kind)
    dense = ablator.value()
    assert (abs(dense) < 1e-7) == (kind != "loss")
    asked = ablator.with_drop(Address("decoder", 3, "attention"))
    assert asked != dense
    assert ablator.value() == dense, "asking keeps nothing"
    ablator.move({Address("decoder", 3, "attention")})
    assert ablator.value() == asked


def test_loss_is_the_models_own() -> None:
    model = build("llama")
    anatomy = discover(model)
    ablator = Ablator(model, anatomy, WINDOWS, "loss")
    with simulate(model, anatomy, ["decoder.1"]), torch.no_grad():
        expected = model(input_ids=WINDOWS.ids, labels=WINDOWS.ids).loss.item()
    assert ablator.with_drop(Address("decoder", 1)) == pytest.approx(expected, rel=1e-5)


def test_work_is_the_sum_of_suffixes() -> None:
    model = build("llama")
    anatomy = discover(model)
    ablator = Ablator(model, anatomy, WINDOWS)
    rises = ablation(ablator, units(anatomy.outline, "block"))
    assert ablator.work == 36 * (5 + 4 + 3 + 2 + 1 + 0)
    assert list(rises) == [Address("decoder", i) for i in range(5)]
    assert all(rise > 0 for rise in rises.values())


def test_order_of_asking_does_not_matter() -> None:
    model = build("llama")
    anatomy = discover(model)
    asked = units(anatomy.outline, "sublayer")
    one = ablation(Ablator(model, anatomy, WINDOWS), asked)
    ablator = Ablator(model, anatomy, WINDOWS)
    assert one == {unit: ablator.with_drop(unit) for unit in reversed(asked)}


def test_order_of_windows_does_not_matter() -> None:
    model = build("llama")
    anatomy = discover(model)
    unit = Address("decoder", 2)
    one = Ablator(model, anatomy, WINDOWS).with_drop(unit)
    turned = Ablator(model, anatomy, Windows.of(WINDOWS.ids.flip(0), "test")).with_drop(unit)
    assert one == pytest.approx(turned, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "stack"), [("vit", None), ("bert", None), ("t5", "encoder"), ("t5", "decoder"), ("clip", "vision")]
)
def test_any_stack_has_an_error_of_its_stream(name: str, stack: str | None) -> None:
    model = build(name)
    anatomy = discover(model)
    ablator = Ablator(model, anatomy, [FAMILIES[name].inputs(model, 2, None)], "stream", stack)
    asked = [a for a in units(anatomy.outline, "block") if a.stack == ablator.replay.stack.name]
    rises = ablation(ablator, asked)
    assert len(rises) == len(asked) > 0
    assert all(rise > 1e-3 for rise in rises.values())


def test_stream_error_of_a_known_change() -> None:
    """Padding is left out, and an error twice the stream is 4."""
    model = build("llama")
    ablator = Ablator(model, discover(model), [FAMILIES["llama"].inputs(model, 3, "right")], "stream")
    real, stream = ablator.replay.real[0], ablator.replay.final[0]
    tripled = [torch.where(real[..., None], 3 * stream, 7)]
    assert ablator._judge(tripled) == pytest.approx(4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_broken_model_is_infinitely_far(kind: Kind, value: float) -> None:
    model = build("llama")
    ablator = Ablator(model, discover(model), WINDOWS, kind)
    broken = [stream.clone() for stream in ablator.replay.final]
    broken[0][0, 2] = value
    assert ablator._judge(broken) == math.inf
    broken = [torch.full_like(stream, value) for stream in ablator.replay.final]
    assert ablator._judge(broken) == math.inf


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_turn_is_the_mean_cosine_lost_by_the_last_stream(name: str) -> None:
    model = build(name)
    anatomy = discover(model)
    inputs = FAMILIES[name].inputs(model, 3, "right")
    ablator = Ablator(model, anatomy, [inputs], "turn")
    assert ablator.value() == pytest.approx(0, abs=1e-6)
    unit = Address(next(iter(FAMILIES[name].stacks)), 1)
    real = inputs["attention_mask"].bool()
    dense, cut = ablator.replay.final[0][real], ablator.replay.without(unit)[0][real]
    expected = 1 - torch.cosine_similarity(dense, cut, dim=-1).mean().item()
    assert expected > 0.001
    assert ablator.with_drop(unit) == pytest.approx(expected, abs=1e-5)
