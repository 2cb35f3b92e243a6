"""Norm weights and biases refitted: one regression a channel."""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST = 1e-12


def norm_refit(
    normed: Tensor, goal: Tensor, w: Tensor, weight: Tensor, bias: Tensor | None, penalty: float
) -> tuple[Tensor, Tensor | None]:
    """Norm parameters under which its output comes nearest to ``goal``: new weight and bias [hidden], in float32.

    ``normed`` [tokens, hidden] is what the norm makes of the stream before weight and bias (its output with weight 1
    and bias 0), ``goal`` [tokens, hidden] the dense output, ``w`` [tokens] weighs tokens (say 1 / |goal|^2).
    Channel by channel it minimises

        sum over tokens of w (goal - a normed - b)^2 + penalty e ((a - weight)^2 + (b - bias)^2),

    with e the weighted mean energy of a channel of ``normed`` (so that the penalty is relative to the data); without a
    bias b is 0. Two unknowns a channel: for reads that cannot be refitted themselves (fused experts), or too few tokens
    for more. Cost: a few passes over the tokens.
    """
    x, z, w = normed.float(), goal.float(), w.float()[:, None]
    old = weight.float()
    ridge = penalty * (w * x.square()).sum(0).mean().clamp(min=_SMALLEST)
    xx, xz = (w * x * x).sum(0) + ridge, (w * x * z).sum(0) + ridge * old
    if bias is None:
        return xz / xx, None
    n, sx, sz = w.sum() + ridge, (w * x).sum(0), (w * z).sum(0) + ridge * bias.float()
    determinant = torch.clamp(xx * n - sx * sx, min=_SMALLEST)
    return (xz * n - sx * sz) / determinant, (xx * sz - sx * xz) / determinant
