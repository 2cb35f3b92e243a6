"""Parts of a stack run on a given stream, inside the model's own forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy.bridge import require_no_bridges
from billhook.anatomy.types import Stack, Sublayer
from billhook.heal.refit.places import Place
from billhook.measure.batches import for_the_head, real_tokens
from billhook.measure.patch import (
    Forward,
    Reached,
    Tail,
    hand_on,
    hooked,
    hooked_before,
    lending,
    observing,
    on_stream,
    overridden,
    put_in,
    silencers,
    stream_in,
    stream_out,
    tail_of,
)
from billhook.plan.errors import InputError


class Batches:
    """Fixed inputs of a model. Blocks that are not to run hand on what they get; masks, positions and per-layer
    arguments are the model's business."""

    def __init__(self, model: nn.Module, stack: Stack, batches: list[dict[str, Any]]) -> None:
        require_no_bridges(model)
        self.model, self.stack, self.batches = model, stack, batches
        self._blocks = [model.get_submodule(block.path) for block in stack.blocks]
        self.tails: list[dict[int, Tail]] = [{} for _ in batches]  # what each block returned beside the stream

    def like(self, other: Batches) -> None:
        """Take what blocks return beside the stream from another model of the same blocks."""
        self.tails = other.tails

    def enter(self, batch: int) -> Tensor:
        """The stream at the input of the first block [rows, tokens, hidden]."""
        seen: list[Tensor] = []

        def stop(*args: Any, **kwargs: Any) -> Any:
            seen.append(stream_in(*args, **kwargs))
            raise Reached

        self._forward(batch, [(self._blocks[0], stop)])
        return self._finite(batch, seen[0], f"into {self.stack.blocks[0].address}")

    def real(self, batch: int, stream: Tensor) -> Tensor:
        """Which positions are no padding: bool [rows, tokens]."""
        return real_tokens(self.batches[batch], self.stack.name, stream)

    def last(self, batch: int) -> Tensor:
        """The stream after the last block that the model has now, whatever has been done to it."""
        block = next(reversed(list(self.model.get_submodule(self.stack.path).children())))
        seen: list[Tensor] = []

        def stop(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            seen.append(stream_out(output))
            raise Reached

        self._forward(batch, (), [(block, stop)])
        return seen[0]

    def logits(self, ids: Tensor, stream: Tensor) -> Tensor:
        """What the dense model makes of a piece of the stream after its last block: [c] and [c, hidden] -> [c, v].

        Final norm, head and whatever the model does to logits are its own: it runs over these ids and every block
        hands on, with what it returned beside the stream when it was run."""
        tails = [self.tails[0].get(i) for i in range(len(self._blocks))]
        blocks = [(block, partial(hand_on, tail=tail)) for block, tail in zip(self._blocks, tails, strict=True)]
        blocks[-1] = self._blocks[-1], partial(put_in, stream=stream[None], tail=tails[-1])
        with observing(self.model), overridden(blocks):
            return torch.as_tensor(self.model(**for_the_head(self.model, ids)).logits)[0]

    def _forward(
        self,
        batch: int,
        forwards: Iterable[tuple[nn.Module, Forward]],
        hooks: Iterable[tuple[nn.Module, Forward]] = (),
        gradients: bool = False,
    ) -> None:
        with observing(self.model), torch.set_grad_enabled(gradients), overridden(forwards), hooked(hooks):
            try:
                self.model(**self.batches[batch])
            except Reached:
                return
        raise InputError(f"the inputs never reach stack {self.stack.name}")

    def _finite(self, batch: int, stream: Tensor, where: str) -> Tensor:
        if not stream[self.real(batch, stream)].isfinite().all():
            raise InputError(f"NaN or infinite values come {where}: the weights or the inputs are damaged")
        return stream


class Stepper(Batches):
    """Runs single places; those after them are not reached. Of each block whose keys and values later ones read it
    holds the stream that it was last run on, where it runs again for these: so one stream at a time can walk through
    such a model. Each call costs the place, such blocks before it, and what the model does before its first block."""

    def __init__(self, model: nn.Module, stack: Stack, batches: list[dict[str, Any]]) -> None:
        super().__init__(model, stack, batches)
        self._lent: list[dict[int, Tensor]] = [{} for _ in batches]

    def run(
        self,
        batch: int,
        place: Place,
        stream: Tensor,
        silent: Iterable[Sublayer],
        hooks: Iterable[tuple[nn.Module, Forward]] = (),
    ) -> Tensor:
        """The stream after a place, given the stream at it, with these sublayers of the block writing nothing."""
        block = self._blocks[place.number]
        own = block.forward
        outputs: list[Any] = []

        def visit(*args: Any, **kwargs: Any) -> Any:
            with overridden(silencers(self.model, silent)), hooked(hooks):
                outputs.append(on_stream(*args, own=own, stream=stream, **kwargs))
            raise Reached

        self._forward(batch, [*self._before(batch, place.number), (block, visit)])
        output = outputs[0]
        self.tails[batch].setdefault(place.number, tail_of(output))
        if place.block.lends and any(sublayer.kind == "attention" for sublayer in place.sublayers):
            self._lent[batch][place.number] = stream
        return self._finite(batch, stream_out(output), f"out of {place.block.address}")

    def given(
        self,
        batch: int,
        place: Place,
        stream: Tensor,
        silent: Iterable[Sublayer],
        linears: Mapping[str, nn.Module],
    ) -> dict[str, Tensor]:
        """What these linears of a place are given, by name, as far as they are asked; nothing behind the last of them
        is computed."""
        block = self._blocks[place.number]
        own = block.forward
        seen: dict[str, Tensor] = {}

        def look(name: str, module: nn.Module, args: Any) -> None:
            seen[name] = args[0]
            if len(seen) == len(linears):
                raise Reached

        def visit(*args: Any, **kwargs: Any) -> Any:
            looks = [(linear, partial(look, name)) for name, linear in linears.items()]
            with overridden(silencers(self.model, silent)), hooked_before(looks):
                on_stream(*args, own=own, stream=stream, **kwargs)
            raise Reached

        self._forward(batch, [*self._before(batch, place.number), (block, visit)])
        return seen

    def _before(self, batch: int, number: int) -> Iterator[tuple[nn.Module, Forward]]:
        """What stands in the place of the blocks before one."""
        for i, block in enumerate(self._blocks[:number]):
            answer = partial(hand_on, tail=self.tails[batch][i])
            if i in self._lent[batch]:
                answer = partial(lending, own=block.forward, stream=self._lent[batch][i], answer=answer)
            yield block, answer
