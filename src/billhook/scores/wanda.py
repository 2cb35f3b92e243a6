"""How much weight an inner unit is written with, times how strong it is."""

from __future__ import annotations

import torch
from torch import Tensor

from billhook.anatomy import Anatomy
from billhook.measure.width import WidthTrace
from billhook.plan.address import Address
from billhook.scores.registry import score


@score("wanda-structured", needs="channels")
def wanda_structured(trace: WidthTrace, anatomy: Anatomy) -> dict[Address, Tensor]:
    """The sum over the channels j of a unit of E_i|W_ij| sqrt(E[x_j^2]), W being the weight that writes (down, o), x
    what it is given, i its outputs.

    Source: Wanda (arXiv 2306.11695, equation 1) for single weights, summed over structures as in the Wanda-SP baseline
    of FLAP (arXiv 2312.11983). There the sum over tokens stands in place of the mean, which orders alike. Cost: one
    forward pass."""
    found = {}
    for a in trace.units:
        parts = zip(trace.writes(a), trace.given(a, "rms"), strict=True)
        found[a] = torch.stack([(w.abs().double().mean(-1) * rms).sum(1) for w, rms in parts]).sum(0)
    return found
