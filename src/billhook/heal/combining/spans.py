"""Some blocks of a stack run one after the other on a given stream, inside the model's own forward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from billhook.anatomy.types import Stack
from billhook.heal.refit.stepping import Batches
from billhook.measure.patch import Forward, Reached, hand_on, on_stream, stream_out, tail_of


class Spans(Batches):
    """Runs spans of blocks; those behind are not reached. The first runs must reach every block from the front, since
    what a block returns beside the stream is kept for when it hands on."""

    def __init__(self, model: nn.Module, stack: Stack, batches: list[dict[str, Any]]) -> None:
        super().__init__(model, stack, batches)
        self.work = 0
        """Block-token forwards so far; the caller adds the backward passes."""

    def run(self, batch: int, blocks: Sequence[int], stream: Tensor, gradients: bool = False) -> Tensor:
        """The stream behind the last of these blocks, given the stream at the first."""
        if not blocks:
            return stream
        first, last, tails = blocks[0], blocks[-1], self.tails[batch]
        others = [i for i in range(last) if i not in blocks]
        forwards: list[tuple[nn.Module, Forward]]
        forwards = [(self._blocks[i], partial(hand_on, tail=tails[i])) for i in others]
        forwards.append((self._blocks[first], partial(on_stream, own=self._blocks[first].forward, stream=stream)))
        outputs: list[Any] = []

        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            outputs.append(output)
            if module is self._blocks[last]:
                raise Reached

        self._forward(batch, forwards, [(self._blocks[i], keep) for i in blocks], gradients)
        for number, output in zip(blocks, outputs, strict=True):
            tails.setdefault(number, tail_of(output))
        self.work += len(blocks) * stream.shape[0] * stream.shape[1]
        return stream_out(outputs[-1])
