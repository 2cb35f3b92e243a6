"""What the write linears are given, against what hooks of the test's own see."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, build
from hypothesis import given, settings
from hypothesis import strategies as st

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.measure.channels import Channels, channels
from billhook.plan.errors import InputError

SUPPORTED = list(FAMILIES)
IDS = torch.randint(3, 90, (4, 10), generator=torch.Generator().manual_seed(3))


def assert_same(one: dict[str, Channels], other: dict[str, Channels], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].count == other[name].count
        for figure in ("mean", "variance", "rms"):
            a, b = getattr(one[name], figure), getattr(other[name], figure)
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_family(name: str) -> None:
    """Every write linear that is a module is seen, with its true moments over all tokens."""
    model = build(name)
    anatomy = discover(model)
    inputs = FAMILIES[name].inputs(model, 2, None)
    found = channels(model, anatomy, [inputs])
    linears = {
        write: model.get_submodule(write.removesuffix(".weight"))
        for stack in anatomy.stacks
        for block in stack.blocks
        for sublayer in block.sublayers
        for write in sublayer.writes
        if write.endswith(".weight") and model.get_parameter(write).ndim == 2
    }
    assert found.keys() == linears.keys()
    seen: dict[str, torch.Tensor] = {}
    for write, linear in linears.items():
        linear.register_forward_hook(lambda m, args, output, write=write: seen.update({write: args[0]}))
    with torch.no_grad():
        model(**inputs)
    for write, x in seen.items():
        rows = x.reshape(-1, x.shape[-1]).double()
        assert found[write].count == len(rows)
        torch.testing.assert_close(found[write].mean, rows.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[write].variance, rows.var(0, correction=0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[write].rms, rows.square().mean(0).sqrt(), rtol=1e-5, atol=1e-6)


@given(order=st.permutations(range(4)), cut=st.integers(1, 3))
@settings(max_examples=8)
def test_parts_of_a_calibration_add_up(order: list[int], cut: int) -> None:
    """Two shards are one, in any order and of any size."""
    model = build("llama")
    anatomy = discover(model)
    whole = channels(model, anatomy, Windows.of(IDS, "test"))
    first, second = (channels(model, anatomy, Windows.of(IDS[part], "test")) for part in (order[:cut], order[cut:]))
    assert_same(whole, {name: first[name] + second[name] for name in first}, 1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "t5", "bart"])
def test_padding_does_not_count(name: str, side: str) -> None:
    """Padded rows give what they give alone; IDs under the padding change nothing."""
    family = FAMILIES[name]
    model = build(name)
    anatomy = discover(model)
    padded = family.inputs(model, 3, side)
    found = channels(model, anatomy, [padded])
    noisy = dict(padded)
    mask = padded["attention_mask"].bool()
    noisy["input_ids"] = torch.where(mask, padded["input_ids"], 7)
    assert_same(found, channels(model, anatomy, [noisy]), 1e-5)
    assert min(c.count for c in found.values()) < max(padded["input_ids"].numel(), 1)


def test_damaged_weights_are_named() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.down_proj"):
        channels(model, discover(model), Windows.of(IDS, "test"))
