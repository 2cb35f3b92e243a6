"""Reads: one linear map, folded into all linears of a sublayer that are given the same."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from families import FAMILIES, build
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from billhook.anatomy import discover
from billhook.heal.refit.places import places
from billhook.heal.refit.reads import folded, reads_of, same_inputs
from billhook.heal.refit.stepping import Stepper
from billhook.heal.refit.watch import keep_input
from billhook.measure.batches import batches_of
from billhook.measure.patch import hooked


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


@pytest.mark.parametrize("name", FAMILIES)
def test_what_reads_are_given_is_known_before_the_rest_is_computed(name: str) -> None:
    model = build(name)
    stack = discover(model).stacks[-1]
    stepper = Stepper(model, stack, list(batches_of([FAMILIES[name].inputs(model, 2, None)], model)))
    stream = stepper.enter(0)
    for place in places(stack):
        reads: dict[str, nn.Module] = {}
        for sublayer in place.sublayers:
            reads |= reads_of(model, sublayer)
        whole: dict[str, list[Tensor]] = {read: [] for read in reads}
        hooks = [(linear, partial(keep_input, whole[read])) for read, linear in reads.items()]
        after = stepper.run(0, place, stream, (), hooks)
        computed: list[Tensor] = []
        with hooked((linear, partial(keep_input, computed)) for linear in reads.values()):
            seen = stepper.given(0, place, stream, (), reads)
        asked = {read: inputs for read, inputs in whole.items() if inputs}
        assert seen.keys() == asked.keys()
        assert all(torch.equal(seen[read], inputs) for read, (inputs,) in asked.items())
        assert len(computed) == max(0, len(seen) - (asked == whole)), "not even the last of the reads"
        stream = after
