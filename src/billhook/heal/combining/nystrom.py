"""The Nyström approximation: some of many inner units, and the write with which they do best what all of them did."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.heal.refit.ridge import Moments, solve

_SMALLEST = 1e-6  # of all energy: below that, sums in float32 are noise


@dataclass(frozen=True)
class Pruned:
    """``units`` that stay, in order; the ``write`` [channels of theirs, o] and the ``bias`` [o]. ``before`` and
    ``after``: what is lost of the held-back energy with the old weights and with these; ``penalty`` None where the old
    ones are no worse."""

    units: Tensor
    write: Tensor
    bias: Tensor
    before: float
    after: float
    penalty: float | None


def pruned(fit: Moments, held: Moments, write: Tensor, bias: Tensor | None, width: int, count: int) -> Pruned:
    """The ``count`` units of ``width`` channels whose channels have the highest ``leverage``, and

        W_S <- W_S + (C_SS + p)^-1 C_SR W_R

    for the channels S that stay and R that go. ``fit`` and ``held`` hold the sums C of products of all n channels and
    of a constant 1 behind them, ``write`` is W [n, o]; a bias [o] is refitted too, none is made. p is the one that is
    best on ``held`` (see ``solve``).
    """
    scores = leverage(fit.inputs[:-1, :-1], write.norm(dim=1), count * width)
    units = scores.reshape(-1, width).sum(1).argsort(descending=True, stable=True)[:count].sort().values
    channels = (units[:, None] * width + torch.arange(width, device=units.device)).reshape(-1)
    prior = torch.cat([write, write.new_zeros(1, write.shape[1]) if bias is None else bias[None]])
    stays = torch.zeros(len(prior), dtype=torch.bool, device=units.device)
    stays[channels] = True
    stays[-1] = bias is not None
    lacks = _lacking(held, prior, stays)
    found = solve(_lacking(fit, prior, stays), lacks)
    new = prior[stays] if found is None else prior[stays] + found.change
    energy = max(_energy(held.inputs, prior), torch.finfo(torch.float64).tiny)
    return Pruned(
        units=units,
        write=new[: len(channels)],
        bias=prior[-1] if bias is None else new[-1],
        before=lacks.energy / energy,
        after=(lacks.energy if found is None else found.error) / energy,
        penalty=None if found is None else found.penalty,
    )


def leverage(moments: Tensor, size: Tensor, count: int) -> Tensor:
    """The ridge leverage score of each channel, float64 [n], from 0 to 1: the diagonal of A (A + r)^-1 for
    A = diag(size) C diag(size), ``moments`` C [n, n] being the sums of products of the channels, and ``size`` [n] how
    strongly each is written. The ridge r is the energy of A outside its ``count`` largest directions divided by
    ``count``: what would be lost even at best counts as noise, and the scores add up to no more than 2 ``count``.

    Source: El Alaoui and Mahoney 2015 (arXiv 1411.0306), with the ridge of Musco and Musco 2017 (arXiv 1605.07583).
    Cost: eigenvalues and an inversion of n x n in float64.
    """
    size = size.double()
    a = size[:, None] * moments.double() * size
    total = a.diagonal().sum()
    if total == 0:
        return torch.zeros_like(size)
    tail = torch.linalg.eigvalsh(a).clamp(min=0)[: len(a) - count].sum()
    ridge = torch.maximum(tail / count, _SMALLEST * total)
    a.diagonal().add_(ridge)
    scores: Tensor = 1 - ridge * torch.linalg.inv(a).diagonal()
    return scores


def _lacking(moments: Moments, prior: Tensor, stays: Tensor) -> Moments:
    """The moments of the channels that stay against what the others write."""
    gone = prior[~stays]
    found = Moments()
    found.inputs = moments.inputs[stays][:, stays]
    found.cross = moments.inputs[stays][:, ~stays] @ gone
    found.energy = _energy(moments.inputs[~stays][:, ~stays], gone)
    found.tokens = moments.tokens
    return found


def _energy(moments: Tensor, write: Tensor) -> float:
    """sum w |W' h|^2."""
    return ((moments @ write) * write).sum(dtype=torch.float64).item()
