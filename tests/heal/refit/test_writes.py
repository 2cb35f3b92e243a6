"""Which write linears can be refitted, and through what their output reaches the stream."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from families import FAMILIES, build
from torch import Tensor

from billhook.anatomy import discover
from billhook.heal.refit.places import places
from billhook.heal.refit.stepping import Stepper
from billhook.heal.refit.writes import FUSED, MIXED, Write, scale_of, writes_of
from billhook.measure.batches import batches_of
from billhook.measure.patch import observing


def scales(name: str, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    """Of every write linear of a family's last stack."""
    model = build(name).to(dtype)
    anatomy = discover(model)
    stack = anatomy.stacks[-1]
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in FAMILIES[name].inputs(model, 2, None).items()}
    stepper = Stepper(model, stack, list(batches_of([batch], model)))
    stream = stepper.enter(0)
    found = []
    for place in places(stack):

        def run(write: Write, hook: object, place=place, stream=stream) -> Tensor:
            hooks = [] if hook is None else [(write.linear, hook)]
            return stepper.run(0, place, stream, place.silent(frozenset()), hooks)

        for sublayer in place.sublayers:
            found += [scale_of(partial(run, write)) for write in writes_of(model, sublayer, place.mixed)[0]]
        stream = run(None, None)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "expected"), [("llama", 1.0), ("falcon", 1.0), ("gpt2", 1.0), ("granite", 0.6)])
def test_a_constant_on_the_way_is_found(name: str, expected: float, dtype: torch.dtype) -> None:
    found = scales(name, dtype)
    assert len(found) == 10
    for scale in found:
        assert scale is not None
        torch.testing.assert_close(scale, torch.full_like(scale, expected), atol=1e-2, rtol=0)


def test_layer_scales_are_found_channel_by_channel() -> None:
    model = build("dinov2")
    layers = discover(model).stacks[0].blocks
    expected = [model.get_submodule(f"{b.path}.layer_scale{n}").lambda1 for b in layers for n in (1, 2)]
    for scale, true in zip(scales("dinov2"), expected, strict=True):
        assert scale is not None
        torch.testing.assert_close(scale, true.detach(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_a_norm_on_the_way_is_noticed(name: str, dtype: torch.dtype) -> None:
    assert all(scale is None for scale in scales(name, dtype))


@pytest.mark.parametrize(("name", "reason"), [("mixtral", FUSED), ("bert", MIXED)])
def test_the_others_are_left_alone_with_a_reason(name: str, reason: str) -> None:
    model = build(name)
    place = places(discover(model).stacks[0])[-1]
    found, left = writes_of(model, place.sublayers[-1], place.mixed)
    assert not found
    assert set(left.values()) == {reason}


@pytest.mark.parametrize(("name", "block"), [("gpt2", "transformer.h.0"), ("llama_bias", "model.layers.0")])
def test_new_weights_write_what_was_asked(name: str, block: str) -> None:
    model = build(name)
    sublayer = discover(model).stacks[0].blocks[0].sublayers[-1]
    (write,), _ = writes_of(model, sublayer, mixed=False)
    assert write.bias is not None and write.weight.startswith(block)
    h = torch.randn(7, 128 if name == "gpt2" else 48)
    change = torch.randn(h.shape[1] + 1, 32)
    with observing(model):
        before = write.linear(h)
        new = write.changed(change)
        step = write.written(h, new)
        model.load_state_dict(new, strict=False)
        torch.testing.assert_close(step, write.inputs(h) @ change, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(write.linear(h), before + step, atol=1e-3, rtol=1e-3)


def test_a_channel_that_hardly_reaches_the_stream_is_noticed() -> None:
    base, written = torch.randn(2, 5, 6), torch.zeros(2, 5, 6)

    def reached(scale: Tensor) -> Tensor | None:
        return scale_of(lambda hook: base + scale * (written if hook is None else hook(None, (), {}, written)))  # type: ignore[arg-type]

    torch.testing.assert_close(reached(torch.tensor([1.0, 2, 1, 1, 1, 0.1])), torch.tensor([1.0, 2, 1, 1, 1, 0.1]))
    assert reached(torch.tensor([1.0, 2, 1, 1, 1, 0.001])) is None
