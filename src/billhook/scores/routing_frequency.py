"""How often an expert is picked."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from billhook.anatomy import Anatomy
from billhook.measure.width import WidthTrace
from billhook.plan.address import Address
from billhook.scores.registry import score


@score("routing-frequency", needs="routing")
def routing_frequency(trace: WidthTrace, anatomy: Anatomy) -> dict[Address, Tensor]:
    """The share of all picks of a router that go to the expert; shares of one mixture add up to 1.

    An expert that no token of the calibration was sent to is unknown, not unimportant: infinite, so that nothing drops
    it. Source: "hints from its routing policy" of M-SMoE (arXiv 2310.01334, section 3), where the most frequent experts
    stay. Cost: one forward pass.
    """
    return {
        a: torch.where(r.slots > 0, r.frequency, torch.full_like(r.slots, math.inf)) for a, r in trace.routing.items()
    }
