"""Blocks stepped around at random while a model is trained, so that it bears any of them missing later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

from torch import nn

from billhook.measure.patch import hooked, stream_in


@contextmanager
def stepped_around(blocks: Sequence[nn.Module], share: float, draw: str) -> Iterator[None]:
    """Each block but the first and the last hands on what it got with probability ``share``; the same draw, the same
    blocks. A share of 0 changes nothing.

    Source: SkipPipe (arXiv 2502.19913), where microbatches skip stages of consecutive blocks in pipeline-parallel
    training and the model then bears missing ones; LayerDrop (arXiv 1909.11556) draws single blocks, as is done here,
    so that no pattern is preferred. A skipped block is computed all the same and gets no gradient.
    """
    random = Random(draw)
    gone = [block for block in blocks[1:-1] if random.random() < share]
    with hooked((block, _hand_on) for block in gone):
        yield


def _hand_on(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    stream = stream_in(*args, **kwargs)
    return (stream, *output[1:]) if isinstance(output, tuple) else stream
