"""One place of a stack run on a given stream, inside the model's own forward."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy.types import Stack, Sublayer
from billhook.heal.places import Place
from billhook.measure.batches import real_tokens
from billhook.measure.patch import Forward, Reached, hooked, observing, overridden, silencers, stream_in, stream_out
from billhook.plan.errors import InputError

Tail = tuple[Any, ...] | None


class Stepper:
    """Runs single places over fixed batches; blocks before the place hand on what they get, those after it are not
    reached. Masks, positions and per-layer arguments are the model's business. Holds the batches, and of each block
    what it returned beside the stream. Each call costs the place and what the model does before its first block."""

    def __init__(self, model: nn.Module, stack: Stack, batches: list[dict[str, Any]]) -> None:
        self.model, self.stack, self.batches = model, stack, batches
        self._blocks = [model.get_submodule(block.path) for block in stack.blocks]
        self._tails: list[dict[int, Tail]] = [{} for _ in batches]

    def enter(self, batch: int) -> Tensor:
        """The stream at the input of the first block [rows, tokens, hidden]."""
        seen: list[Tensor] = []

        def stop(*args: Any, **kwargs: Any) -> Any:
            seen.append(stream_in(*args, **kwargs))
            raise Reached

        self._forward(batch, [(self._blocks[0], stop)])
        return self._finite(batch, seen[0], f"into {self.stack.blocks[0].address}")

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
            if args:
                args = (stream, *args[1:])
            else:
                kwargs = {**kwargs, "hidden_states": stream}
            with overridden(silencers(self.model, silent)), hooked(hooks):
                outputs.append(own(*args, **kwargs))
            raise Reached

        tails = self._tails[batch]
        before = [(self._blocks[i], partial(_hand_on, tail=tails[i])) for i in range(place.number)]
        self._forward(batch, [*before, (block, visit)])
        output = outputs[0]
        tails.setdefault(place.number, output[1:] if isinstance(output, tuple) else None)
        return self._finite(batch, stream_out(output), f"out of {place.block.address}")

    def last(self, batch: int) -> Tensor:
        """The stream after the last block that the model has now, whatever has been done to it."""
        block = next(reversed(list(self.model.get_submodule(self.stack.path).children())))
        own = block.forward
        seen: list[Tensor] = []

        def stop(*args: Any, **kwargs: Any) -> Any:
            seen.append(stream_out(own(*args, **kwargs)))
            raise Reached

        self._forward(batch, [(block, stop)])
        return seen[0]

    def logits(self, ids: Tensor, stream: Tensor) -> Tensor:
        """What the dense model makes of a piece of the stream after its last block: [c] and [c, hidden] -> [c, v].

        Final norm, head and whatever the model does to logits are its own: it runs over these ids and every block
        hands on, with what it returned beside the stream when it was run."""
        hand_on = [(block, partial(_hand_on, tail=self._tails[0].get(i))) for i, block in enumerate(self._blocks[:-1])]
        last = (self._blocks[-1], partial(_put_in, stream=stream[None], tail=self._tails[0].get(len(self._blocks) - 1)))
        cached = {"use_cache": False} if "use_cache" in self.batches[0] else {}
        with observing(self.model), overridden([*hand_on, last]):
            return torch.as_tensor(self.model(input_ids=ids[None], **cached).logits)[0]

    def real(self, batch: int, stream: Tensor) -> Tensor:
        """Which positions are no padding: bool [rows, tokens]."""
        return real_tokens(self.batches[batch], self.stack.name, stream)

    def _forward(self, batch: int, forwards: list[tuple[nn.Module, Forward]]) -> None:
        with observing(self.model), overridden(forwards):
            try:
                self.model(**self.batches[batch])
            except Reached:
                return
        raise InputError(f"the inputs never reach stack {self.stack.name}")

    def _finite(self, batch: int, stream: Tensor, where: str) -> Tensor:
        if not stream[self.real(batch, stream)].isfinite().all():
            raise InputError(f"NaN or infinite values come {where}: the weights or the inputs are damaged")
        return stream


def _hand_on(*args: Any, tail: Tail, **kwargs: Any) -> Any:
    stream = stream_in(*args, **kwargs)
    return stream if tail is None else (stream, *tail)


def _put_in(*args: Any, stream: Tensor, tail: Tail, **kwargs: Any) -> Any:
    return stream if tail is None else (stream, *tail)
