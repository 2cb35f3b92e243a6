"""How much of what is read off the residual stream comes through one of its channels."""

from __future__ import annotations

import torch
from torch import Tensor

from billhook.anatomy import Anatomy
from billhook.measure.stream import StreamTrace
from billhook.scores.registry import score


@score("stream-activation", needs="stream")
def stream_activation(trace: StreamTrace, anatomy: Anatomy) -> dict[str, Tensor]:
    """The sum over all norms of sqrt(E[z_c^2]), z_c being what channel c comes to after the norm, where a sublayer or
    the head reads it.

    Source: Minitron (arXiv 2407.14679), which ranks embedding channels by the outputs of norms over a calibration text
    and tries several ways to sum them up; here the root of the mean square over all tokens is taken at each norm. Cost:
    one forward pass."""
    return {stack: sum((g.rms for g in given), torch.zeros(())) for stack, given in trace.given.items()}


@score("stream-reads", needs="stream")
def stream_reads(trace: StreamTrace, anatomy: Anatomy) -> dict[str, Tensor]:
    """The mean over all that read the stream of the share of what they read that comes through channel c, and the mean
    over the blocks of its share of the energy of the stream, added up.

    A sublayer or the head reads W z off what it is given: the share of c is |W_c|^2 E[z_c^2] over the sum of that over
    the channels, W_c being its column in all reads. The share of the energy is E[x_c^2 / n], n the same sum: without c
    every norm divides by less, which changes what is read through all the others. Shares add up to one in each place,
    so no place outweighs another. Cost: one forward pass.

    A choice of this project; Wanda (arXiv 2306.11695) weighs a single weight by |W| sqrt(E[z^2]) likewise."""
    found = {}
    for stack, given in trace.given.items():
        read = torch.stack([_share(_columns(w) * g.rms**2) for w, g in zip(trace.reads[stack], given, strict=True)])
        carried = torch.stack([_share(c.rms**2) for c in trace.carried[stack]])
        found[stack] = read.mean(0) + carried.mean(0)
    return found


def _columns(weights: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([weight.float().square().sum(0).double().cpu() for weight in weights]).sum(0)


def _share(energy: Tensor) -> Tensor:
    return energy / energy.sum().clamp(min=torch.finfo(torch.float64).tiny)
