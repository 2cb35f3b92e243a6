"""What the linears that write to the stream are given, channel by channel: sums of one streaming pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy.types import Anatomy, Block
from billhook.data import Windows
from billhook.measure.batches import Batch, batches_of, real_tokens
from billhook.measure.patch import Forward, Reached, hooked, observing, stream_in
from billhook.plan.errors import InputError

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Channels:
    """Sums over ``count`` tokens of each input channel x of one linear: ``total`` of x, ``squares`` of x^2, float64
    [inputs], on the CPU. Parts of a calibration add up."""

    count: int
    total: Tensor
    squares: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Channels:
        """Tokens [n, inputs]. Summed in float32 within a batch and in float64 between batches."""
        rows = rows.float()
        return cls(len(rows), rows.sum(0).double().cpu(), rows.square().sum(0).double().cpu())

    def __add__(self, other: Channels) -> Channels:
        return Channels(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        """E[(x - E[x])^2]: how much a channel fluctuates; never negative."""
        return (self.squares / self.count - self.mean.square()).clamp(min=0)

    @property
    def rms(self) -> Tensor:
        """sqrt(E[x^2]): the Euclidean norm over all tokens by the root of their number."""
        return (self.squares / self.count).sqrt()


def channels(
    model: nn.Module, anatomy: Anatomy, source: Windows | Iterable[Batch], progress: Progress | None = None
) -> dict[str, Channels]:
    """For each linear that writes to the stream, by the name of its weight: what it is given, over all tokens that are
    no padding. A linear that the calibration never reached is not there; neither are fused experts, which are no
    linear.

    Cost: one forward pass up to the last block. Memory: two vectors for each linear, and for one batch what the linears
    of one block are given. Raises InputError where an input is not finite, and if nothing is reached at all.
    """
    batches = list(batches_of(source, model))
    found: dict[str, Channels] = {}
    for index, inputs in enumerate(batches):
        with observing(model), hooked(_hooks(model, anatomy, inputs, found)), suppress(Reached):
            model(**inputs)
        if progress is not None:
            progress("inner channels", index + 1, len(batches))
    if not found:
        raise InputError("the calibration reaches no linear that writes to the stream")
    return found


def write_linears(model: nn.Module, block: Block) -> Iterator[tuple[str, nn.Module]]:
    """The linears through which a block writes, with the names of their weights."""
    for sublayer in block.sublayers:
        for name in sublayer.writes:
            if name.endswith(".weight") and model.get_parameter(name).ndim == 2:
                yield name, model.get_submodule(name.removesuffix(".weight"))


def _hooks(
    model: nn.Module, anatomy: Anatomy, inputs: Mapping[str, Any], found: dict[str, Channels]
) -> Iterator[tuple[nn.Module, Forward]]:
    ahead = {stack.name for stack in anatomy.stacks}
    given: dict[str, Tensor] = {}  # of the linears of the block that is running

    def keep(name: str) -> Forward:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given[name] = args[0]

        return hook

    def after(stack: str, block: Block, last: bool) -> Forward:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            real = real_tokens(inputs, stack, stream_in(*args, **kwargs))
            for name, x in given.items():
                if x.numel() // x.shape[-1] != real.numel():
                    continue  # a routed expert: sees a choice of the tokens, and padding among them
                rows = x.reshape(real.numel(), -1)[real.reshape(-1)]
                if not torch.isfinite(rows).all():
                    raise InputError(f"NaN or infinite values go into {name}: weights or inputs are damaged")
                found[name] = found[name] + Channels.of(rows) if name in found else Channels.of(rows)
            given.clear()
            if last:
                ahead.discard(stack)
            if not ahead:
                raise Reached

        return hook

    for stack in anatomy.stacks:
        for block in stack.blocks:
            for name, linear in write_linears(model, block):
                yield linear, keep(name)
            yield model.get_submodule(block.path), after(stack.name, block, block is stack.blocks[-1])
