"""Some blocks of a stack run one after the other on a given stream, inside the model's own forward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy.types import Stack
from billhook.heal.stepping import Tail
from billhook.measure.batches import real_tokens
from billhook.measure.patch import Forward, Reached, hooked, observing, overridden, stream_in, stream_out
from billhook.plan.errors import InputError


class Spans:
    """Runs spans of blocks over fixed batches; all other blocks hand on what they get, those behind are not reached.
    Masks, positions and per-layer arguments are the model's business. The first runs must reach every block from the
    front, since what a block returns beside the stream is kept for when it hands on."""

    def __init__(self, model: nn.Module, stack: Stack, batches: list[dict[str, Any]]) -> None:
        self.model, self.stack, self.batches = model, stack, batches
        self.work = 0
        """Block-token forwards so far; the caller adds the backward passes."""
        self._blocks = [model.get_submodule(block.path) for block in stack.blocks]
        self._tails: list[dict[int, Tail]] = [{} for _ in batches]

    def enter(self, batch: int) -> Tensor:
        """The stream at the input of the first block [rows, tokens, hidden]."""
        seen: list[Tensor] = []

        def stop(*args: Any, **kwargs: Any) -> Any:
            seen.append(stream_in(*args, **kwargs))
            raise Reached

        self._forward(batch, [(self._blocks[0], stop)], [])
        return seen[0]

    def run(self, batch: int, blocks: Sequence[int], stream: Tensor, gradients: bool = False) -> Tensor:
        """The stream behind the last of these blocks, given the stream at the first."""
        if not blocks:
            return stream
        first, last, tails = blocks[0], blocks[-1], self._tails[batch]
        others = [i for i in range(last) if i not in blocks]
        forwards: list[tuple[nn.Module, Forward]] = [
            (self._blocks[i], partial(_hand_on, tail=tails[i])) for i in others
        ]
        forwards.append((self._blocks[first], partial(_given, own=self._blocks[first].forward, stream=stream)))
        outputs: list[Any] = []

        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            outputs.append(output)
            if module is self._blocks[last]:
                raise Reached

        self._forward(batch, forwards, [(self._blocks[i], keep) for i in blocks], gradients)
        for number, output in zip(blocks, outputs, strict=True):
            tails.setdefault(number, output[1:] if isinstance(output, tuple) else None)
        self.work += len(blocks) * stream.shape[0] * stream.shape[1]
        return stream_out(outputs[-1])

    def real(self, batch: int, stream: Tensor) -> Tensor:
        """Which positions are no padding: bool [rows, tokens]."""
        return real_tokens(self.batches[batch], self.stack.name, stream)

    def _forward(
        self,
        batch: int,
        forwards: list[tuple[nn.Module, Forward]],
        hooks: list[tuple[nn.Module, Forward]],
        gradients: bool = False,
    ) -> None:
        with observing(self.model), torch.set_grad_enabled(gradients), overridden(forwards), hooked(hooks):
            try:
                self.model(**self.batches[batch])
            except Reached:
                return
        raise InputError(f"the inputs never reach stack {self.stack.name}")


def _hand_on(*args: Any, tail: Tail, **kwargs: Any) -> Any:
    stream = stream_in(*args, **kwargs)
    return stream if tail is None else (stream, *tail)


def _given(*args: Any, own: Forward, stream: Tensor, **kwargs: Any) -> Any:
    if args:
        return own(stream, *args[1:], **kwargs)
    return own(**{**kwargs, "hidden_states": stream})
