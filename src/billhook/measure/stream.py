"""What runs through the residual stream and what is read off it, channel by channel: sums of one streaming pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy.types import Anatomy, Stack
from billhook.data import Windows
from billhook.measure.batches import Batch, batches_of, real_tokens
from billhook.measure.channels import Channels
from billhook.measure.patch import Forward, hooked, observing, stream_in
from billhook.plan.errors import InputError

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class StreamTrace:
    """Of each stack: ``carried`` is the stream as each block is given it, ``given`` what each sublayer reads (normed
    where it has a norm in front) and, last, what the head does; ``reads`` are the live weights that read it, each
    [outputs, channels]. ``carried`` and ``given`` are measured; ``work`` counts block-token forwards."""

    carried: Mapping[str, tuple[Channels, ...]] = field(default_factory=dict)
    given: Mapping[str, tuple[Channels, ...]] = field(default_factory=dict)
    reads: Mapping[str, tuple[tuple[Tensor, ...], ...]] = field(default_factory=dict)
    work: int = 0


def stream_trace(
    model: nn.Module, anatomy: Anatomy, source: Windows | Iterable[Batch], progress: Progress | None = None
) -> StreamTrace:
    """Over all tokens that are no padding. Cost: one forward pass. Memory: two vectors for each block and sublayer.

    Raises InputError for a model whose stream cannot get narrower, and where the stream is not finite."""
    if not anatomy.residuals:
        raise InputError(f"the stream of this {anatomy.family} model is rigid: {anatomy.outline.stacks[0].rigid}")
    (stack,) = (anatomy.stack(name) for name in anatomy.residuals)
    batches = list(batches_of(source, model))
    found: dict[str, Channels] = {}
    work = 0
    for index, inputs in enumerate(batches):
        with observing(model), hooked(_hooks(model, anatomy, stack, inputs, found)):
            model(**inputs)
        if progress is not None:
            progress("hidden channels", index + 1, len(batches))
    carried = tuple(found[block.path] for block in stack.blocks)
    work = carried[0].count * len(stack.blocks)
    readers = [part for block in stack.blocks for part in block.sublayers]
    given = [found[part.module] for part in readers]
    axes = dict(anatomy.residuals[stack.name].axes)
    reads = [tuple(_matrix(model, name, axes[name]) for name in part.reads) for part in readers]
    if anatomy.head is not None:
        given.append(found[anatomy.head])
        reads.append((_matrix(model, f"{anatomy.head}.weight", 1),))
    return StreamTrace({stack.name: carried}, {stack.name: tuple(given)}, {stack.name: tuple(reads)}, work)


def _matrix(model: nn.Module, name: str, axis: int) -> Tensor:
    """A weight as [outputs, channels], experts one below the other; a view where that can be."""
    weight = model.get_parameter(name).detach()
    return weight.movedim(axis, -1).reshape(-1, weight.shape[axis])


def _hooks(
    model: nn.Module, anatomy: Anatomy, stack: Stack, inputs: Mapping[str, Any], found: dict[str, Channels]
) -> Iterator[tuple[nn.Module, Forward]]:
    def add(path: str) -> Forward:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            stream = stream_in(*args, **kwargs)
            rows = stream[real_tokens(inputs, stack.name, stream)]
            if not torch.isfinite(rows).all():
                raise InputError(f"NaN or infinite values go into {path}: weights or inputs are damaged")
            found[path] = found[path] + Channels.of(rows) if path in found else Channels.of(rows)

        return hook

    for block in stack.blocks:
        yield model.get_submodule(block.path), add(block.path)
        for part in block.sublayers:
            yield model.get_submodule(part.module), add(part.module)
    if anatomy.head is not None:
        yield model.get_submodule(anatomy.head), add(anatomy.head)
