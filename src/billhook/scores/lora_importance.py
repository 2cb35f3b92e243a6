"""How much an inner unit matters to the loss, seen through adapters."""

from __future__ import annotations

import torch
from torch import Tensor

from billhook.anatomy import Anatomy
from billhook.measure.width import WidthTrace
from billhook.plan.address import Address
from billhook.scores.registry import score


@score("lora-importance", needs="adapters")
def lora_importance(trace: WidthTrace, anatomy: Anatomy) -> dict[Address, Tensor]:
    """The sum over the weights of a unit, of all its reads and writes, of (dL/dW W)^2, with dL/dW guessed from the
    slopes of low-rank adapters that are trained meanwhile (see ``lora_slopes``).

    Source: LoRAPrune (arXiv 2305.18403), summed over channels and heads as there. Cost: about three forward passes.
    """
    return {
        a: torch.stack([w.double().sum((1, 2)) for w in (*trace.reads(a), *trace.writes(a))]).sum(0)
        for a in trace.units
    }
