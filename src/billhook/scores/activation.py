"""How strong an inner unit is."""

from __future__ import annotations

import torch
from torch import Tensor

from billhook.anatomy import Anatomy
from billhook.measure.width import WidthTrace
from billhook.plan.address import Address
from billhook.scores.registry import score


@score("activation", needs="channels")
def activation(trace: WidthTrace, anatomy: Anatomy) -> dict[Address, Tensor]:
    """sqrt(E[|h|^2]) of what a unit hands to the linear that writes.

    Source: the fine-grained importance of CFSP (arXiv 2409.13199). Its code multiplies the norm with the weights of
    gate, up and down, each relative to the sum over the same neuron's weights, and takes the mean over the hidden
    channels: that factor is the same for every neuron, so that the norm alone decides. Cost: one forward pass.
    """
    return {a: torch.stack([r.square().sum(1) for r in trace.given(a, "rms")]).sum(0).sqrt() for a in trace.units}
