"""A low-rank path beside a compressed linear, fitted where its inputs live, and merged where that is possible."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.plan.errors import InputError

_SMALLEST = 1e-7  # eigenvalues below this share of the largest carry no input that float32 could vouch for


@dataclass(frozen=True)
class ResidualPath:
    """y = up (down h), ``up`` [o, r], ``down`` [r, n]; ``error`` is what is left of the error, between 0 and 1."""

    up: Tensor
    down: Tensor
    error: float

    def merged(self, weight: Tensor) -> Tensor:
        """The compressed weight [o, n] with the path in it: no path is needed then. Right for a weight kept as a dense
        matrix (of lower rank, or with fewer inputs: make the path of kept inputs only); a sparse or quantised one would
        lose its form."""
        return (weight.float() + self.up @ self.down).to(weight.dtype)


def residual_path(gram: Tensor, lost: Tensor, rank: int) -> ResidualPath:
    """The matrix of at most this rank that best stands for ``lost`` = W - (compressed W), [o, n], on these inputs.

    With the eigenvalues and eigenvectors G = Q L Q' of the Gram matrix of the inputs ([n, n], sum of h h'), the error
    over the tokens is |(lost - up down) Q L^(1/2)|^2, so the singular value decomposition of lost Q L^(1/2), cut off at
    the rank (Eckart-Young), is optimal: up = U S, down = V' L^(-1/2) Q'. Directions in which no input lies (eigenvalue
    below 1e-7 of the largest) are left out.

    Source: EoRA (arXiv 2410.21271), section 3.2 and algorithm 1. Raises InputError for a rank below 1 and for values
    that are not finite. Cost: one eigendecomposition of n x n, one SVD of o x n, in float64.
    """
    if rank < 1:
        raise InputError(f"a residual path needs a rank of at least 1, not {rank}")
    if not (torch.isfinite(gram).all() and torch.isfinite(lost).all()):
        raise InputError("NaN or infinite values in a Gram matrix or a weight: the weights or the inputs are damaged")
    values, vectors = torch.linalg.eigh(gram.double())
    alive = values > _SMALLEST * values[-1]
    root, q = values[alive].sqrt(), vectors[:, alive]
    u, s, v = torch.linalg.svd(lost.double() @ q * root, full_matrices=False)
    total = s.square().sum()
    left = s[rank:].square().sum() / total if total > 0 else total
    return ResidualPath((u * s)[:, :rank].float(), (v / root @ q.T)[:rank].float(), left.item())
