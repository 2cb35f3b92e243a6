"""Which blocks to train: those that matter most just now."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from billhook.measure.patch import stream_in, stream_out

SUPPRESSED = 0.25  # of what a block adds to the stream, this is left
KEPT = 0.5  # of its importance so far, when a block is looked at again


def ist(
    importance: Sequence[float], blocks: Sequence[nn.Module], loss: Callable[[], float], count: int, seed: str
) -> list[float]:
    """The importance of every block, updated for ``2 count`` of them drawn at random: the rise of the loss while only a
    quarter of what the block adds to the stream is let through. Train the ``most_important``. A block that was never
    looked at has importance 0.

    Source: IST (arXiv 2410.11772), section 3: importance estimated as training goes, by suppressing the response of
    layers. There several are suppressed at once and rewarded; here one at a time, which needs no reward.
    Cost: 2 count + 1 evaluations of the loss.
    """
    updated = list(importance)
    before = loss()
    for number in sorted(random.Random(seed).sample(range(len(blocks)), min(2 * count, len(blocks)))):
        with _suppressed(blocks[number]):
            rise = loss() - before
        updated[number] = KEPT * updated[number] + (1 - KEPT) * rise
    return updated


def most_important(importance: Sequence[float], count: int) -> list[int]:
    return sorted(sorted(range(len(importance)), key=lambda i: (-importance[i], i))[:count])


@contextmanager
def _suppressed(block: nn.Module) -> Iterator[None]:
    def weaken(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        before, after = stream_in(*args, **kwargs), stream_out(output)
        stream = before + SUPPRESSED * (after - before)
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    handle = block.register_forward_hook(weaken, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
