"""How far apart the stream is before and after a run of blocks."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from billhook.anatomy import Anatomy
from billhook.measure.sums import Trace
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.scores.registry import score


@score("angular", needs="angular")
def angular(trace: Trace, anatomy: Anatomy, span: Annotated[int, Field(ge=1)] = 1) -> dict[Address, float]:
    """The least mean angular distance, from 0 to 1, over all spans of so many blocks that a block lies in.

    Source: "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887), which drops the one best span
    (see ``search.span``). Turned into a score of single blocks here: the blocks of the best span have the lowest
    score, all of them the same. Cost: the trace. InputError if a stack has no span of this length.
    """
    scores = {}
    for stack in trace.angles:
        distances = _spans(trace, stack, span)
        for block in range(len(distances) + span - 1):
            scores[Address(stack, block)] = min(distances[max(0, block - span + 1) : block + 1])
    return scores


def _spans(trace: Trace, stack: str, n: int) -> list[float]:
    """Mean distance over each span of n blocks, by its first block."""
    distances = trace.angular(stack)
    if not 1 <= n <= len(distances):
        raise InputError(f"a span of {n} blocks does not fit {stack}, which has {len(distances)}")
    return distances[n - 1]
