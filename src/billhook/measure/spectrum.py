"""Which directions of what a linear puts out carry most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.plan.errors import InputError


@dataclass(frozen=True, eq=False)
class Spectrum:
    """``energies`` [useful] of the first directions of the output, falling, ``total`` the energy of all of them;
    ``basis`` [outputs, useful], float32, its columns those directions. As many as two linears save anything with."""

    energies: Tensor
    total: float
    basis: Tensor


def spectrum(weight: Tensor, moments: Tensor | None, useful: int) -> Spectrum:
    """Of a weight W [outputs, inputs] the first ``useful`` directions of its output (see ``search.bases``).

    ``moments``: C [inputs, inputs], or its diagonal [inputs], or None for 1. Cost: an eigenvalue decomposition of the
    smaller side, in float64, and one of C where that is the inputs. Raises InputError for values that are not finite.
    """
    w = weight.double()
    if not w.isfinite().all() or (moments is not None and not moments.isfinite().all()):
        raise InputError("NaN or infinite values in a weight or in what it is given: they are damaged")
    c = w.new_ones(w.shape[1]) if moments is None else moments.double()
    if len(w) <= w.shape[1]:
        output = (w * c if c.ndim == 1 else w @ c) @ w.T
        energies, basis = torch.linalg.eigh(output)
        total, basis = output.trace(), basis.flip(1)[:, :useful]
    else:
        if c.ndim == 1:
            a = w * c.sqrt()
        else:
            values, vectors = torch.linalg.eigh(c)
            a = w @ vectors * values.clamp(min=0).sqrt()
        energies, right = torch.linalg.eigh(a.T @ a)
        total = a.square().sum()
        basis = torch.linalg.qr(a @ right.flip(1)[:, :useful])[0]  # orthonormal also where an energy is next to nothing
    return Spectrum(energies.flip(0)[:useful].clamp(min=0).cpu(), total.item(), basis.float().cpu())
