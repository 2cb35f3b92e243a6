"""Ridge regression from sums: a change of a linear's weights that is no larger than the data can vouch for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Ridge penalties relative to the mean energy of an input, tried from the first on until the held-back error rises.
PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-6, 1e-8)


class Moments:
    """Sums over tokens of a weighted least-squares problem, inputs h [i], residual r [o] that a change of weights is to
    write: ``inputs`` = sum w h h' [i, i], ``cross`` = sum w h r' [i, o], ``energy`` = sum w |r|^2. In float32, on the
    device of the model."""

    def __init__(self) -> None:
        self.inputs = self.cross = torch.zeros(())
        self.energy, self.tokens = 0.0, 0

    def add(self, h: Tensor, r: Tensor, w: Tensor) -> None:
        """Tokens [n, i], [n, o] with weights [n]."""
        root = w.float().sqrt()[:, None]
        h, r = h.float() * root, r.float() * root
        self.inputs = self.inputs.to(h.device) + h.T @ h
        self.cross = self.cross.to(h.device) + h.T @ r
        self.energy += r.square().sum(dtype=torch.float64).item()
        self.tokens += len(r)

    def error(self, change: Tensor) -> float:
        """sum w |r - change' h|^2 for a change [i, o]."""
        change = change.double()
        explained = 2 * (change * self.cross.double()).sum() - (change * (self.inputs.double() @ change)).sum()
        return self.energy - explained.item()


@dataclass(frozen=True)
class Solution:
    """``change`` [i, o] in float32, and the held-back error with it."""

    change: Tensor
    penalty: float
    error: float


def solve(fit: Moments, held: Moments) -> Solution | None:
    """The change that minimises sum w |r - change' h|^2 + penalty |change|^2 over ``fit``, with the penalty under which
    the error over ``held`` is lowest; None if it is lowest without a change.

    Since ``change`` is counted from the old weights, the ridge (Hoerl and Kennard 1970) draws towards them and not
    towards zero. Penalties are tried from the strongest on; the search ends when the error rises. Cost: i^3 / 3 + 2 i^2
    o multiplications for each penalty, in float64.
    """
    scale = fit.inputs.diagonal().mean().double()
    best: Solution | None = None
    if not torch.isfinite(scale) or scale == 0:
        return None
    for penalty in PENALTIES:
        system = fit.inputs.double()
        system.diagonal().add_(penalty * scale)
        factor, failed = torch.linalg.cholesky_ex(system)
        if failed:
            break
        change = torch.cholesky_solve(fit.cross.double(), factor).float()
        error = held.error(change)
        if error < (held.energy if best is None else best.error):
            best = Solution(change, penalty, error)
        elif best is not None:
            break
    return best
