"""How much of what an inner unit reads is its own, by the statistics of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from billhook.anatomy import Anatomy
from billhook.measure.width import WidthTrace
from billhook.plan.address import Address
from billhook.scores.registry import score


@score("parameter-statistics", needs="weights")
def parameter_statistics(trace: WidthTrace, anatomy: Anatomy) -> dict[Address, Tensor]:
    """Var(w_u) (1 - max r_uv^2), with w_u all weights through which unit u reads (gate and up; q, k and v), and r_uv
    their correlation with those of v, over the units v of the sublayer that have more variance.

    So of units that read alike the strongest stays, and the others have nothing of their own. Source: ISCS (2025,
    "Parameter-Guided Channel Ordering and Grouping for Learned Image Compression"), whose abstract names variances,
    sizes of biases and pairwise correlations, of the channels of image codecs, and no formula: this one is ours, and
    leaves out biases, which few of these models have. Cost: one look at the weights, units x weights of a sublayer.
    """
    found = {}
    for a in trace.units:
        rows = torch.cat([w.flatten(1) for w in trace.reads(a)], 1)  # [units, weights]
        rows = rows - rows.mean(1, keepdim=True)
        variance = rows.double().square().mean(1)
        rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
        place = variance.argsort(descending=True, stable=True).argsort()
        shared = torch.where(place < place[:, None], (rows @ rows.T).square(), 0.0).amax(1)
        found[a] = variance * (1 - shared.double()).clamp(min=0)
    return found
