"""How the loss of units is shared between sublayers, by how much their blocks matter."""

from __future__ import annotations

import math
from collections.abc import Mapping

from scipy.special import expit

from billhook.plan.address import Address


def sigmoid_shares(importance: Mapping[Address, float], share: float, steepness: float) -> dict[Address, float]:
    """Which share of its units each sublayer loses, so that the mean is ``share``: with d the ``importance`` of its
    block and s = 1 / (1 + exp(-steepness (d - mean d))), what is kept is proportional to s.

    Source: CFSP (arXiv 2409.13199), d being the angular distance of the stream from before to behind a block. There the
    distances are summed over 131,072 tokens and divided by 10,000: a steepness of 13.1. Where some sublayer would keep
    all its units or more, all are drawn towards the mean until the largest keeps 1 / 1.05 of the way to that, as in the
    authors' code."""
    middle = math.fsum(importance.values()) / len(importance)
    kept = {a: float(expit(steepness * (d - middle))) for a, d in importance.items()}
    mean = math.fsum(kept.values()) / len(kept)
    kept = {a: s / mean * (1 - share) for a, s in kept.items()}
    most = max(kept.values())
    if most >= 1:
        draw = share / (most - (1 - share)) / 1.05
        kept = {a: (1 - share) + draw * (k - (1 - share)) for a, k in kept.items()}
    return {a: 1 - k for a, k in kept.items()}
