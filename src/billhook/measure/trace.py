"""One streaming pass over the calibration: how each block and sublayer changes the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import chain
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from billhook.anatomy.bridge import require_no_bridges
from billhook.anatomy.types import Anatomy, Block, Stack
from billhook.data import Windows
from billhook.measure.batches import Batch, batches_of, real_tokens
from billhook.measure.patch import Forward, Reached, hooked, observing, overridden, silencers, stream_in, stream_out
from billhook.measure.sums import Angles, Mean, Trace
from billhook.plan.address import Address
from billhook.plan.errors import InputError

Statistic = Literal["block", "sublayer", "angular"]
Progress = Callable[[str, int, int], None]
_ANGLE_CHUNK = 128


def trace(
    model: nn.Module,
    anatomy: Anatomy,
    source: Windows | Iterable[Batch],
    statistics: Iterable[Statistic],
    progress: Progress | None = None,
) -> Trace:
    """Watch the model on the inputs and take the statistics asked for, over all tokens that are no padding.

    ``block`` and ``sublayer`` take, for the stream x before and y after each unit, the means of

    - ``cosine``: cos(x, y); 1 - E[cos] is the block influence of ShortGPT (arXiv 2403.03853);
    - ``update``: ||y - x|| / ||x||, the relative norm of what the unit writes;
    - ``update_share``: ||y - x|| / ||y||;
    - ``alignment``: cos(x, y - x), below 0 where the unit takes away from the stream (arXiv 2505.13898).

    The stream after a sublayer is what its block would hand on if the later sublayers were silent (in a parallel
    block: all others), which is what dropping these leaves; the stream before it is what the previous one left.

    ``angular`` takes (1 / pi) arccos cos(x_i, x_j) for the stream at all pairs of block inputs, the distance of "The
    Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887). The paper looks at the last token of each
    text; here all tokens count, for less noise from the same text.

    Cost: one forward pass up to the last block (no head); ``sublayer`` runs each sublayer but the last once more.
    Memory: the inputs, and for one batch the stream at all blocks. Sums are in float64. Raises InputError where the
    stream is not finite, and if nothing is reached at all.
    """
    require_no_bridges(model)
    asked = frozenset(statistics)
    unknown = sorted(asked - set(get_args(Statistic)))
    if unknown:
        raise InputError(f"there is no statistic {unknown[0]!r}; there are {', '.join(get_args(Statistic))}")
    batches = list(batches_of(source, model))
    total = Trace()
    for index, inputs in enumerate(batches):
        pass_ = _Pass(model, anatomy, inputs, asked)
        with observing(model), hooked(pass_.hooks()), suppress(Reached):
            model(**inputs)
        total += pass_.result()
        if progress is not None:
            progress("trace", index + 1, len(batches))
    if total.work == 0:
        raise InputError("the calibration reaches no block of the model")
    return total


class _Pass:
    """What the hooks gather in one batch."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, inputs: Mapping[str, Any], asked: frozenset[str]) -> None:
        self.model, self.anatomy, self.inputs, self.asked = model, anatomy, inputs, asked
        self.ahead = {stack.name for stack in anatomy.stacks}
        self.figures: dict[str, dict[Address, Mean]] = {}
        self.angles: dict[str, Angles] = {}
        self.work = 0

    def result(self) -> Trace:
        return Trace(self.figures, self.angles, self.work)

    def hooks(self) -> list[tuple[nn.Module, Forward]]:
        return list(chain.from_iterable(map(self._hooks, self.anatomy.stacks)))

    def _hooks(self, stack: Stack) -> list[tuple[nn.Module, Forward]]:
        streams: list[Tensor] = []

        def after(block: Block) -> Forward:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                x, y = stream_in(*args, **kwargs), stream_out(output)
                real = real_tokens(self.inputs, stack.name, x)
                self.work += real.numel()
                if block is stack.blocks[0] and not x.isfinite().all():
                    raise InputError(f"NaN or infinite values come into {block.address}: the inputs are damaged")
                if not y[real].isfinite().all():
                    raise InputError(f"NaN or infinite values come out of {block.address}: its weights are damaged")
                if "block" in self.asked:
                    self._compare(block.address, x[real], y[real])
                if "sublayer" in self.asked:
                    self._sublayers(module, block, args, kwargs, y, real)
                if "angular" in self.asked:
                    streams.append(x[real])
                if block is stack.blocks[-1]:
                    if "angular" in self.asked:
                        self.angles[stack.name] = Angles(_angles([*streams, y[real]]), len(y[real]))
                    self._finish(stack)

            return hook

        return [(self.model.get_submodule(block.path), after(block)) for block in stack.blocks]

    def _finish(self, stack: Stack) -> None:
        self.ahead.discard(stack.name)
        if not self.ahead:
            raise Reached

    def _sublayers(self, module: nn.Module, block: Block, args: Any, kwargs: Any, y: Tensor, real: Tensor) -> None:
        before = stream_in(*args, **kwargs)[real]
        for index, sublayer in enumerate(block.sublayers):
            others = block.sublayers[:index] if block.parallel else ()
            silent = [*others, *block.sublayers[index + 1 :]]
            after = y[real]
            if silent:
                with overridden(silencers(self.model, silent)):
                    after = stream_out(module.forward(*args, **kwargs))[real]
                self.work += real.numel()
            self._compare(sublayer.address, before, after)
            if not block.parallel:
                before = after

    def _compare(self, unit: Address, x: Tensor, y: Tensor) -> None:
        """Add up how y [tokens, hidden] differs from x, row by row."""
        x, y = x.float(), y.float()
        tiny = torch.finfo(torch.float32).tiny
        before, after = x.norm(dim=-1).clamp(min=tiny), y.norm(dim=-1).clamp(min=tiny)
        written = (y - x).norm(dim=-1)
        rows = {
            "cosine": (x * y).sum(-1) / before / after,
            "update": written / before,
            "update_share": written / after,
            "alignment": ((y - x) * x).sum(-1) / before / written.clamp(min=tiny),
        }
        for name, values in rows.items():
            mean = Mean(values.sum(dtype=torch.float64).item(), len(values))
            self.figures.setdefault(name, {})[unit] = mean


def _angles(streams: list[Tensor]) -> Tensor:
    """Sum over tokens of the angular distances between all pairs of n + 1 streams [tokens, hidden]: [n + 1, n + 1]."""
    total = torch.zeros(len(streams), len(streams), dtype=torch.float64)
    for pieces in zip(*(torch.split(stream, _ANGLE_CHUNK) for stream in streams), strict=True):
        units = nn.functional.normalize(torch.stack(pieces, 1).double(), dim=-1)
        cosines = units @ units.transpose(1, 2)
        total += (cosines.clamp(-1, 1).arccos() / torch.pi).sum(0).cpu()
    return total
