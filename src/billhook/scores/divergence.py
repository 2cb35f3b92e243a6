"""What dropping a unit alone does to the output."""

from __future__ import annotations

from billhook.anatomy import Anatomy
from billhook.measure.ablation import Kind
from billhook.measure.sums import Trace
from billhook.plan.address import Address
from billhook.scores.registry import Unit, of_kind, score


@score("divergence", needs="damage")
def divergence(trace: Trace, anatomy: Anatomy, unit: Unit = "block", of: Kind = "kl") -> dict[Address, float]:
    """By how much the divergence from the dense output (``kl``, nats a token), the ``loss`` (nats a token, may fall),
    the relative squared error of the last ``stream`` or a distance of the output rises if the unit alone is dropped;
    ``of`` says which.

    Cost: the ablation, n(n - 1)/2 block forwards for n blocks; InputError if the trace has none of this kind.
    """
    return of_kind(trace.means(of), unit)
