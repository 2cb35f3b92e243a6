"""Removed channels rebuilt from kept ones, folded into the write that read them."""

from __future__ import annotations

import torch
from torch import Tensor

from billhook.plan.errors import InputError


def reconstruction(gram: Tensor, weight: Tensor, kept: Tensor, penalty: float) -> Tensor:
    """The weight V [o, k], float32, of a write W [o, n] of which only the inputs ``kept`` [k] stay, that minimises

        sum over tokens of |W h - V h[kept]|^2 + penalty m |V - W[:, kept]|^2,    m = mean diagonal of the Gram matrix.

    ``gram`` [n, n] is the sum of h h' over tokens (weighted, if the tokens are). With R the removed inputs,
    V = W[:, kept] + W[:, R] S where S = G[R, kept] (G[kept, kept] + penalty m)^-1 is the ridge regression of removed on
    kept inputs: one linear reconstruction for all outputs. No gram over data is needed: see ``gram_of_reads``.

    Sources: linear reconstruction with data, He et al. 2017 (arXiv 1707.06168), equation 3; without data, UDFC
    (arXiv 2308.07209), section 3. The penalty draws to the plain cut, in which S = 0. Raises InputError for
    indices that are not distinct inputs, and a Gram matrix that is not finite. Cost: k^3 / 3 + k^2 (n - k), in float64.
    """
    gone = removed(kept, weight.shape[1])
    if not torch.isfinite(gram).all():
        raise InputError("NaN or infinite values in the Gram matrix: the weights or the inputs are damaged")
    g = gram.double()
    system = g[kept][:, kept]
    system.diagonal().add_(penalty * g.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny))
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed:
        raise InputError(f"a penalty of {penalty} is too small for this Gram matrix: kept inputs depend on each other")
    guess = torch.cholesky_solve(g[kept][:, gone], factor)  # S' [k, removed]
    return (weight[:, kept].double() + weight[:, gone].double() @ guess.T).float()


def gram_of_reads(*reads: Tensor) -> Tensor:
    """The Gram matrix [n, n] that the weights of the reads alone suggest for the inner channels, float32.

    Each read is [n, hidden], one row a channel, norm weight folded in. With x white Gaussian of length
    hidden, channels that are linear in x have the Gram matrix R R'; products of two reads (gated MLPs: g'x u'x), by
    Isserlis' theorem, (G G') * (U U') + (G U') * (U G') + diag(G U') diag(G U')', entry by entry. Activation functions
    are left out, as UDFC leaves out what its layers do beside a scale; that is the price of asking for no data.
    """
    if len(reads) == 1:
        r = reads[0].float()
        return r @ r.T
    if len(reads) != 2:
        raise InputError(f"inner channels are linear in one read or products of two, not of {len(reads)}")
    g, u = (read.float() for read in reads)
    mixed = g @ u.T
    both = mixed.diagonal()
    return (g @ g.T) * (u @ u.T) + mixed * mixed.T + both[:, None] * both[None, :]


def removed(kept: Tensor, inputs: int) -> Tensor:
    """The other inputs, in order. InputError unless ``kept`` are distinct and in range."""
    gone = torch.ones(inputs, dtype=torch.bool, device=kept.device)
    if len(kept) and (int(kept.min()) < 0 or int(kept.max()) >= inputs):
        raise InputError(f"kept inputs are numbers from 0 to {inputs - 1}")
    gone[kept] = False
    if int(gone.sum()) != inputs - len(kept):
        raise InputError("an input is kept twice")
    return gone.nonzero()[:, 0]
