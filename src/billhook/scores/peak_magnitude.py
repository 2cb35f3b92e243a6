"""How far the weights of an inner unit reach to both sides."""

from __future__ import annotations

import torch
from torch import Tensor

from billhook.anatomy import Anatomy
from billhook.measure.width import WidthTrace
from billhook.plan.address import Address
from billhook.scores.registry import score


@score("peak-magnitude", needs="weights")
def peak_magnitude(trace: WidthTrace, anatomy: Anatomy) -> dict[Address, Tensor]:
    """The sum over gate and up (q, k and v) of max w + |min w| over the weights of a unit.

    Source: Martra 2025 (arXiv 2512.22671), "peak-to-peak magnitude", for the neurons of gated MLPs; for KV groups the
    mean over their channels here. Cost: one look at the weights.
    """
    return {a: torch.stack([peak(w) for w in trace.reads(a)]).sum(0) for a in trace.units}


@score("peak-magnitude-activation", needs="channels")
def peak_magnitude_activation(trace: WidthTrace, anatomy: Anatomy) -> dict[Address, Tensor]:
    """The sum over gate, up and down of the peak magnitude, each relative to the largest of the sublayer, times the
    root mean square of the unit's activation.

    Source: the data-driven form of the same author's optipfair (``neuron_selection_method`` "PPM" with a data loader).
    Cost: one forward pass.
    """
    found = {}
    for a in trace.units:
        peaks = [peak(w) for w in (*trace.reads(a), *trace.writes(a))]
        norm = torch.stack([rms.square().sum(1) for rms in trace.given(a, "rms")]).sum(0).sqrt()
        found[a] = torch.stack([p / p.max().clamp(min=1e-30) for p in peaks]).sum(0) * norm
    return found


def peak(weights: Tensor) -> Tensor:
    """max w + |min w| over the last axis of [units, width, n], mean over the width: float64 [units]."""
    return (weights.amax(-1) + weights.amin(-1).abs()).double().mean(1)
