"""How much a unit writes, relative to the stream."""

from __future__ import annotations

from typing import Literal

from billhook.anatomy import Anatomy
from billhook.measure.sums import Trace
from billhook.plan.address import Address
from billhook.scores.registry import Unit, of_kind, score


@score("update-norm", needs="change")
def update_norm(
    trace: Trace, anatomy: Anatomy, unit: Unit = "block", relative_to: Literal["input", "output"] = "input"
) -> dict[Address, float]:
    """E[||y - x|| / ||x||] over all tokens, ``relative_to`` the input, or with ||y|| below the line, the output; 0 for
    a unit that writes nothing.

    Unlike the cosine it sees a unit that lengthens the stream without turning it. Cost: the trace.
    """
    return of_kind(trace.means("update" if relative_to == "input" else "update_share"), unit)
