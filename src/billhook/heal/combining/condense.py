"""Experts brought into the form in which a cut takes them apart: neurons that matter first, the others of low rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_RIDGE = 1e-3  # of the mean energy of an input: directions that few tokens took go by the weights


@dataclass(frozen=True, eq=False)
class Expert:
    """The weights of one expert: gate above up [2 neurons, hidden], and down [hidden, neurons]."""

    gate_up: Tensor
    down: Tensor


def foremost(expert: Expert, neurons: Tensor) -> Expert:
    """The same expert with the neurons first that write most, by the values [tokens, n] that they hand to the write:
    |down_j|^2 sum h_j^2. It computes the same; of equals the first."""
    written = neurons.float().square().sum(0) if len(neurons) else expert.down.new_ones(expert.down.shape[1]).float()
    order = (written * expert.down.float().square().sum(0)).argsort(descending=True, stable=True)
    gate, up = expert.gate_up.chunk(2)
    return Expert(torch.cat([gate[order], up[order]]), expert.down[:, order])


def low_reads(expert: Expert, given: Tensor, rank: int) -> Expert:
    """Gate and up of all neurons but the first ``rank``, of that rank together: the nearest on what the expert was
    ``given`` [tokens, hidden]."""
    n = expert.down.shape[1]
    others = torch.arange(2 * n, device=expert.down.device).reshape(2, n)[:, rank:].reshape(-1)
    gate_up = expert.gate_up.clone()
    gate_up[others] = nearest(gate_up[others], given, rank)
    return Expert(gate_up, expert.down)


def low_writes(expert: Expert, neurons: Tensor, rank: int) -> Expert:
    """Down of all neurons but the first ``rank``, of that rank: the nearest on the values [tokens, n] of neurons."""
    down = expert.down.clone()
    down[:, rank:] = nearest(down[:, rank:], neurons[:, rank:], rank)
    return Expert(expert.gate_up, down)


def nearest(weight: Tensor, given: Tensor, rank: int) -> Tensor:
    """The matrix of a ``rank`` nearest to W [outputs, inputs] on what it is ``given`` [tokens, inputs]: U U'W, where U
    are the first left singular vectors of W C^(1/2), and C the second moments of the inputs (as in SVD-LLM, arXiv
    2403.07378, section 3.1; with a slight ridge, and 1 where there is nothing)."""
    w, x = weight.double(), given.double()
    moments = x.T @ x
    scale = moments.diagonal().mean() if len(x) else moments.new_zeros(())
    moments.diagonal().add_(_RIDGE * scale if scale > 0 else 1.0)
    values, vectors = torch.linalg.eigh(moments)
    basis = torch.linalg.svd(w @ vectors * values.clamp(min=0).sqrt(), full_matrices=False).U[:, :rank]
    product: Tensor = basis @ (basis.T @ w)
    return product.to(weight.dtype)
