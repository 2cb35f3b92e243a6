"""Affine maps from one depth to another by least squares, with a penalty that the fitted text itself chooses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Ridge penalties relative to the mean variance of an input direction.
PENALTIES = (10.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-6, 1e-8)
_CHUNK = 1024
_SMALLEST = 1e-12  # energy of a token, against division by zero


class Ridge:
    """Ridge regression on fixed inputs x [tokens, i], whose columns have mean 0, onto any number of targets.

    The penalty is the one of ``PENALTIES`` with the least generalised cross-validation (Golub, Heath and Wahba 1979),

        |y - prediction|^2 / (tokens - 1 - trace of the hat matrix)^2,

    which asks for no other text. With the eigenvalues of x'x both terms cost next to nothing for each penalty, and the
    most expensive part, i^3, is done once for all targets. Sums over tokens are in float64, of products in float32 over
    1,024 tokens; memory i^2 beside the inputs.
    """

    def __init__(self, x: Tensor) -> None:
        values, vectors = torch.linalg.eigh(product(x, x))
        self._values = values.clamp(min=0)
        self._vectors = vectors.float()
        self._x = x @ self._vectors
        self.norm = self._values.square().sum().sqrt().item()
        """|x'x|, Frobenius."""

    def cross(self, y: Tensor) -> Tensor:
        """x'y in the eigenbasis of x'x, float64 [i, o], for centred targets [tokens, o]."""
        return product(self._x, y)

    def solve(self, cross: Tensor, energy: float) -> Tensor:
        """The coefficients [i, o] in float32, for a ``cross`` and the sum of the squares of its targets."""
        found = cross.square().sum(1)
        scale = self._values.mean()
        best, chosen = float("inf"), 0.0
        for penalty in PENALTIES:
            shift = penalty * scale + torch.finfo(torch.float32).tiny
            error = energy - (found * (self._values + 2 * shift) / (self._values + shift).square()).sum().item()
            free = len(self._x) - 1 - (self._values / (self._values + shift)).sum().item()
            criterion = max(error, 0.0) / free**2 if free > 0 else float("inf")
            if criterion < best:
                best, chosen = criterion, float(shift)
        if best == float("inf"):
            return torch.zeros_like(cross, dtype=torch.float32)
        inner: Tensor = (cross / (self._values + chosen)[:, None]).float()
        return torch.matmul(self._vectors, inner)


@dataclass(frozen=True)
class Affine:
    """y = offset + (x - mean) matrix, for x [..., i] and y [..., o]."""

    mean: Tensor
    matrix: Tensor
    offset: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return (self.offset + (x.float() - self.mean) @ self.matrix).to(x.dtype)


def affine(x: Tensor, y: Tensor) -> Affine:
    """The affine map that is closest to taking x [tokens, i] to y [tokens, o]: direct matching (Csiszarik et al., "How
    not to Stitch Representations to Measure Similarity", who fit it by least squares too).

    Each token weighs 1 / |y|^2, or the few tokens with huge streams, such as the first of a text, would decide alone.
    """
    x, y = x.float(), y.float()
    weight = 1 / y.square().sum(-1, keepdim=True).clamp(min=_SMALLEST)
    total = weight.sum(dtype=torch.float64)
    mean, offset = ((weight * part).sum(0, dtype=torch.float64).div(total).float() for part in (x, y))
    root = weight.sqrt()
    inputs, targets = root * (x - mean), root * (y - offset)
    ridge = Ridge(inputs)
    return Affine(mean, ridge.solve(ridge.cross(targets), energy(targets)), offset)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a'b for [tokens, i] and [tokens, o], in float64."""
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=a.device)
    for one, other in zip(torch.split(a, _CHUNK), torch.split(b, _CHUNK), strict=True):
        total += one.T @ other
    return total


def energy(tensor: Tensor) -> float:
    """The sum of squares, in float64."""
    return float(tensor.square().sum(-1).sum(dtype=torch.float64).item())
