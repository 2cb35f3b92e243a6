"""Ridge regression from sums: a change of a linear's weights that is no larger than the data can vouch for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Ridge penalties relative to the mean energy of an input, from the strongest on.
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
        inputs, cross = self.products(h, r)
        self.inputs = self.inputs.to(h.device) + inputs
        self.cross = self.cross.to(h.device) + cross
        self.energy += r.square().sum(dtype=torch.float64).item()
        self.tokens += len(r)

    @staticmethod
    def products(h: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """What ``inputs`` and ``cross`` sum up."""
        return h.T @ h, h.T @ r

    @property
    def scale(self) -> Tensor:
        """The mean energy of an input, which penalties are relative to."""
        return self.inputs.diagonal().mean().double()

    def times(self, change: Tensor) -> Tensor:
        """``inputs`` applied to a change, in float64."""
        return self.inputs.double() @ change

    def change(self, penalty: Tensor) -> Tensor | None:
        """The change that minimises the error with a penalty on its square; None where the system is singular in
        float64."""
        system = self.inputs.double()
        system.diagonal().add_(penalty)
        factor, failed = torch.linalg.cholesky_ex(system)
        return None if failed else torch.cholesky_solve(self.cross.double(), factor).float()

    def error(self, change: Tensor) -> float:
        """sum w |r - change' h|^2 for a change [i, o]."""
        change = change.double()
        explained = 2 * (change * self.cross.double()).sum() - (change * self.times(change)).sum()
        return self.energy - explained.item()


@dataclass(frozen=True)
class Solution:
    """``change`` [i, o] in float32, and the held-back error with it."""

    change: Tensor
    penalty: float
    error: float


def solve(fit: Moments, held: Moments, near: float = PENALTIES[0]) -> Solution | None:
    """The change that minimises sum w |r - change' h|^2 + penalty |change|^2 over ``fit``, with the penalty under which
    the error over ``held`` is lowest; None if it is lowest without a change.

    Since ``change`` is counted from the old weights, the ridge (Hoerl and Kennard 1970) draws towards them and not
    towards zero. Penalties are tried from ``near`` on, weaker ones first and then stronger ones, each way until the
    error rises: with a good guess three suffice. Cost: i^3 / 3 + 2 i^2 o multiplications for each penalty, in float64.
    """
    scale = fit.scale
    if not torch.isfinite(scale) or scale == 0:
        return None
    start = PENALTIES.index(near)
    best = _with(PENALTIES[start], scale, fit, held)
    for penalties in (PENALTIES[start + 1 :], PENALTIES[:start][::-1]):
        for penalty in penalties:
            found = _with(penalty, scale, fit, held)
            if found is None or (best is not None and found.error >= best.error):
                break
            best = found
    return best if best is not None and best.error < held.energy else None


def _with(penalty: float, scale: Tensor, fit: Moments, held: Moments) -> Solution | None:
    change = fit.change(penalty * scale)
    return None if change is None else Solution(change, penalty, held.error(change))
