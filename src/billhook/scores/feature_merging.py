"""How far a neuron is from the one that it would be merged into."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from billhook.anatomy import Anatomy
from billhook.measure.features import MOST, Features
from billhook.measure.width import WidthTrace
from billhook.plan.address import Address
from billhook.scores.registry import score


@score("feature-merging", needs="weights")
def feature_merging(trace: WidthTrace, anatomy: Anatomy) -> dict[Address, Tensor]:
    """The squared distance at which a neuron is merged into another one, when the nearest two of an MLP are merged
    again and again, relative to the largest there.

    Those that half of all merges leave have none, and stay. The later a merge the higher the score, at least as high as
    before. See ``measure.features`` for what is merged, how, and where it comes from. Cost: one look at the weights,
    neurons x weights of an MLP a merge.
    """
    found = {}
    for address, inner in trace.units.items():
        figures = torch.full((inner.count,), math.inf, dtype=torch.float64)
        reached = 0.0
        for merge in Features(inner, trace.weights).merges(round(MOST * inner.count)):
            reached = max(math.nextafter(reached, math.inf), merge.distance)
            figures[merge.gone] = reached
        found[address] = figures
    return found
