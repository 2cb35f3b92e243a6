"""Reads: one linear map, folded into all linears of a sublayer that are given the same."""

from __future__ import annotations

import pytest
import torch
from families import build
from torch import nn
from transformers.pytorch_utils import Conv1D

from billhook.anatomy import discover
from billhook.heal.refit.reads import folded, reads_of, same_inputs


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
