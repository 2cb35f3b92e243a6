"""How much a unit turns the stream."""

from __future__ import annotations

from billhook.anatomy import Anatomy
from billhook.measure.sums import Trace
from billhook.plan.address import Address
from billhook.scores.registry import Unit, of_kind, score


@score("block-influence", needs="change")
def block_influence(trace: Trace, anatomy: Anatomy, unit: Unit = "block") -> dict[Address, float]:
    """1 - E[cos(x, y)] over all tokens, for the stream x before and y after the unit; from 0 to 2.

    Source: ShortGPT (arXiv 2403.03853) for blocks. For sublayers the same on the stream around each of them, residual
    included, as in "What Matters in Transformers?" (arXiv 2406.15786). Cost: the trace.
    """
    return of_kind({a: 1 - cosine for a, cosine in trace.means("cosine").items()}, unit)
