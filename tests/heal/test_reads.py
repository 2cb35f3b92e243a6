"""Reads: one linear map, folded into all linears of a sublayer that are given the same."""

from __future__ import annotations

import pytest
import torch
from families import build
from torch import nn
from transformers.pytorch_utils import Conv1D

from billhook.anatomy import discover
from billhook.heal import closed_form, healed
from billhook.heal.reads import folded, reads_of, same_inputs
from billhook.measure.patch import observing
from billhook.plan.address import Address
from billhook.surgery import simulate


@pytest.mark.parametrize("linear", [nn.Linear(6, 4), Conv1D(4, 6)])
def test_the_new_read_sees_what_was_lacking(linear: nn.Module) -> None:
    x, change = torch.randn(5, 6), torch.randn(6, 6)
    with torch.no_grad():
        expected = linear(x + x @ change)
        linear.weight.copy_(folded({"w": linear}, change)["w"])
        torch.testing.assert_close(linear(x), expected, atol=1e-4, rtol=1e-4)


def test_reads_of_other_things_are_left_alone() -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    assert same_inputs({"q": [x], "k": [x.clone()]}) is not None
    assert same_inputs({"q": [x], "k": [y]}) is None
    assert same_inputs({"q": [x], "k": [x, y]}) is None
    for name, kind in (("mixtral", "mlp"), ("t5", "cross_attention")):
        model = build(name)
        blocks = discover(model).stack("decoder").blocks
        assert not reads_of(model, next(s for s in blocks[1].sublayers if s.kind == kind))


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2"])
def test_with_sandwich_norms_it_is_the_reads_that_heal(name: str) -> None:
    """The writes are left alone, and still the output comes closer to the dense one on text that no fit has seen."""
    model = build(name)
    anatomy = discover(model)
    drops = [Address("decoder", 1, "mlp"), Address("decoder", 2, "mlp")]
    ids = torch.randint(3, 90, (64, 12), generator=torch.Generator().manual_seed(7))
    healing = closed_form(model, anatomy, drops, [{"input_ids": ids[:56]}])
    assert healing.taken
    reads = {name for block in anatomy.stacks[0].blocks for s in block.sublayers for name in s.reads}
    assert set(healing.tensors) <= reads
    with observing(model):
        dense = model(input_ids=ids[56:]).logits
        with simulate(model, anatomy, drops):
            cut = (model(input_ids=ids[56:]).logits - dense).square().mean()
        with healed(model, healing), simulate(model, anatomy, drops):
            now = (model(input_ids=ids[56:]).logits - dense).square().mean()
    assert now < cut
