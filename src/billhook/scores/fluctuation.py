"""How much of an inner unit is lost if a constant stands in for it."""

from __future__ import annotations

import torch
from torch import Tensor

from billhook.anatomy import Anatomy
from billhook.measure.width import WidthTrace
from billhook.plan.address import Address
from billhook.scores.registry import score


@score("fluctuation", needs="channels")
def fluctuation(trace: WidthTrace, anatomy: Anatomy, standardise: bool = True) -> dict[Address, Tensor]:
    """E[(x_j - E[x_j])^2] |W_j|^2 for channel j of what the write (down, o) is given, W_j being its column: the squared
    error written to the stream if the channel is replaced by its mean. ``standardise``: less the mean over the channels
    of the sublayer, by their standard deviation, so that sublayers compare. A unit has the mean over its channels.

    Source: FLAP (arXiv 2312.11983), the metric WIFV with the structure AL-AM. Its code squares the metric of attention
    once more, which the paper does not mention; not so here. Nor is the mean made up for by a bias: that is healing.
    Cost: one forward pass.
    """
    found = {}
    for a in trace.units:
        parts = zip(trace.writes(a), trace.given(a, "variance"), strict=True)
        figures = torch.cat([w.double().square().sum(-1) * variance for w, variance in parts], 1)
        if standardise:
            figures = (figures - figures.mean()) / figures.std().clamp(min=1e-30)
        found[a] = figures.mean(1)
    return found
