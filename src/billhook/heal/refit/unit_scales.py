"""Mask tuning: one scale for every unit that stays, solved and folded into the write."""

from __future__ import annotations

import torch
from torch import Tensor

from billhook.heal.refit.reconstruct import removed
from billhook.plan.errors import InputError


def unit_scales(gram: Tensor, weight: Tensor, units: Tensor, kept: Tensor, penalty: float) -> Tensor:
    """A scale s [u] for every kept unit of a write W [o, n], float32, that minimises

        sum over tokens of |W h - sum over kept units of s_u W_u h_u|^2 + penalty m |s - 1|^2.

    ``gram`` [n, n] is the sum of h h' over tokens; ``units`` [n] the number of the unit that each input belongs to (a
    neuron: one input, a head: head_dim of them); ``kept`` [u] the numbers of those that stay; m the mean energy that a
    unit writes. With T = (W'W) * G entry by entry, summed over the inputs of units, T[a, b] is what units a and b write
    in common, and s solves (T[kept, kept] + penalty m) s = sum over all b of T[kept, b] + penalty m. Fold it in with
    ``scaled``. u unknowns instead of o k: it needs few tokens and cannot do much harm.

    Source: mask tuning of COMP (arXiv 2501.15255) as Kwon et al. (arXiv 2204.09656, section 4.3) state it, a linear
    least-squares problem a layer; the ridge towards 1 is added. Raises InputError for unknown units and a Gram matrix
    that is not finite. Cost: o n^2 + u^3 / 3, in float64.
    """
    table = in_common(gram, weight, units)
    removed(kept, len(table))
    return solved(table, kept, penalty).float()


def in_common(gram: Tensor, weight: Tensor, units: Tensor) -> Tensor:
    """T [u, u] of all units, float64 (see ``unit_scales``)."""
    if not torch.isfinite(gram).all():
        raise InputError("NaN or infinite values in the Gram matrix: the weights or the inputs are damaged")
    w = weight.double()
    common = (w.T @ w) * gram.double()
    of = torch.zeros(len(units), int(units.max()) + 1, dtype=torch.float64, device=gram.device)
    of[torch.arange(len(units)), units] = 1
    return of.T @ common @ of


def solved(table: Tensor, kept: Tensor, penalty: float) -> Tensor:
    """The scales of kept units, float64, from what units write in common."""
    strength = penalty * table.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    system = table[kept][:, kept]
    system.diagonal().add_(strength)
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed:
        raise InputError(f"a penalty of {penalty} is too small: what kept units write depends on each other")
    return torch.cholesky_solve((table[kept].sum(1) + strength)[:, None], factor)[:, 0]


def missed(table: Tensor, kept: Tensor, scales: Tensor) -> float:
    """The sum over tokens of |all that is written - what the kept units write, scaled|^2."""
    crossed = scales @ table[kept].sum(1)
    return float(table.sum() - 2 * crossed + scales @ table[kept][:, kept] @ scales)


def scaled(weight: Tensor, units: Tensor, kept: Tensor, scales: Tensor) -> Tensor:
    """The write [o, k] of the inputs of kept units alone, in their order in the weight, times the scales; its dtype."""
    of = torch.zeros(int(units.max()) + 1, device=weight.device)
    of[kept] = scales
    alive = torch.isin(units, kept)
    return (weight[:, alive].float() * of[units[alive]]).to(weight.dtype)
