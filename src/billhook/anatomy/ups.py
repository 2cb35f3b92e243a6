"""The half of a gated MLP that no activation follows."""

from __future__ import annotations

from collections.abc import Sequence

from billhook.anatomy.types import Slice
from billhook.anatomy.vocabulary import UPS


def ups(pieces: Sequence[Slice]) -> list[Slice]:
    """Of the parts of a tensor that neurons own, those (weight and bias) of the linear whose outputs an activation of
    others is multiplied with: a neuron may read c times as much through it and write 1 / c. None of an MLP without a
    gate, and where which it is is not known."""
    found = []
    reads = [piece for piece in pieces if not piece.writes]
    for piece in reads:
        fused = any(other.parameter == piece.parameter and other.start < piece.start for other in reads)
        if fused or piece.parameter.split(".")[-2] in UPS:
            found.append(piece)
    return found if len(found) < len(reads) else []
