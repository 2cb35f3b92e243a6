"""Neurons of an MLP that compute nearly the same, merged one pair after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.anatomy.types import Inner, Slice
from billhook.anatomy.ups import ups
from billhook.plan.errors import InputError

MOST = 0.5  # of the neurons of an MLP are merged away at most
ALIKE = 0.1  # of the largest squared distance, as in the authors' code: nearer neurons count as one feature


@dataclass(frozen=True)
class Merge:
    """``gone`` was merged into ``into``, at this squared distance, relative to the largest of the MLP."""

    into: int
    gone: int
    distance: float


class Features:
    """The neurons of one MLP in a normal form: what a neuron reads and writes may be scaled against each other, and
    both turned round, where it reads through a linear that no activation follows (up); with |up| = |down| only the sign
    is open. ``rows`` holds what each neuron has in every tensor, float32 [neurons, n]."""

    def __init__(self, inner: Inner, weights: Mapping[str, Tensor]) -> None:
        """InputError for units that are no neurons, and for weights that are not finite."""
        if inner.kind != "neuron":
            raise InputError(f"features are merged among neurons, and these units are {inner.kind}s")
        self.pieces = tuple(piece for piece in inner.slices if piece.parameter in weights)
        self.rows = [_rows(piece, inner.count, weights[piece.parameter]) for piece in self.pieces]
        if not all(rows.isfinite().all() for rows in self.rows):
            raise InputError(f"{self.pieces[0].parameter} or its siblings hold values that are not finite")
        self.count = inner.count
        linear = ups(self.pieces)
        self._up = [n for n, piece in enumerate(self.pieces) if piece in linear]
        self._down = [n for n, piece in enumerate(self.pieces) if piece.writes]
        self._fixed = [n for n in range(len(self.pieces)) if n not in self._up + self._down]
        if self._up:
            up, down = (self._norm(part) for part in (self._up, self._down))
            scale = torch.where((up > 0) & (down > 0), (down / up.clamp(min=1e-30)).sqrt(), 1.0)[:, None]
            for n in self._up:
                self.rows[n] = self.rows[n] * scale
            for n in self._down:
                self.rows[n] = self.rows[n] / scale
        self._size = torch.ones(inner.count, device=self.rows[0].device)

    def merges(self, count: int, within: float = float("inf")) -> list[Merge]:
        """Merge the nearest pair, and again, ``count`` times or as long as the nearest are ``within`` this squared
        distance, relative to the largest.

        The squared distance of two neurons is that of all they hold, with the better of both signs; of a pair the one
        of lower number stays, with the mean of what they read, weighed by how many neurons each stands for already,
        and the sum of what they write. Source: iterative feature merging (arXiv 2310.06756) and its authors' code
        (Ytchen981/Iterative-Feature-Merging) for networks of plain layers; the scale and sign of gated neurons, and a
        largest distance that is taken once, are our own. Memory: neurons^2 x 4 bytes. Cost: one product of that size,
        and neurons x weights a merge.
        """
        distances = self._distances(torch.arange(self.count, device=self._size.device))
        largest = distances.max().clamp(min=1e-30).item()
        distances.fill_diagonal_(float("inf"))
        near, where = distances.min(1)
        found: list[Merge] = []
        while len(found) < count:
            one = int(near.argmin())
            value = near[one].item() / largest
            if value > within or self.count < 2:
                break
            into, gone = sorted((one, int(where[one])))
            self._join(into, gone)
            found.append(Merge(into, gone, value))
            fresh = self._distances(torch.tensor([into], device=near.device))[0]
            fresh[into] = float("inf")
            fresh[distances[into] == float("inf")] = float("inf")  # gone before
            distances[gone] = distances[:, gone] = float("inf")
            distances[into] = distances[:, into] = fresh
            distances[into, gone] = distances[gone, into] = float("inf")
            near[gone] = float("inf")
            stale = ((where == into) | (where == gone)) & (near < float("inf"))
            stale[into] = True
            near[stale], where[stale] = distances[stale].min(1)
            closer = distances[:, into] < near
            near[closer], where[closer] = distances[closer, into], into
        return found

    def _distances(self, some: Tensor) -> Tensor:
        fixed, free = self._products(self._fixed, some), self._products([*self._up, *self._down], some)
        own = sum((rows.square().sum(1) for rows in self.rows), torch.zeros_like(self._size))
        inner = fixed + (free.abs() if self._up else free)
        return (own[some][:, None] + own[None, :] - 2 * inner).clamp(min=0)

    def _products(self, parts: list[int], some: Tensor) -> Tensor:
        total = self._size.new_zeros(len(some), self.count)
        for n in parts:
            total += self.rows[n][some] @ self.rows[n].T
        return total

    def _norm(self, parts: list[int]) -> Tensor:
        return torch.stack([self.rows[n].square().sum(1) for n in parts]).sum(0).sqrt()

    def _join(self, into: int, gone: int) -> None:
        free = self._products([*self._up, *self._down], torch.tensor([into], device=self._size.device))[0, gone]
        sign = -1.0 if self._up and free < 0 else 1.0
        one, other = self._size[into].item(), self._size[gone].item()
        for n, rows in enumerate(self.rows):
            turned = rows[gone] * (1.0 if n in self._fixed else sign)
            rows[into] = rows[into] + turned if n in self._down else (one * rows[into] + other * turned) / (one + other)
        self._size[into] = one + other


def complexity(inner: Inner, weights: Mapping[str, Tensor]) -> float:
    """The share of the neurons of an MLP that are left when those that are alike are merged, 0.5 or more: its feature
    complexity."""
    features = Features(inner, weights)
    return 1 - len(features.merges(round(MOST * features.count), ALIKE)) / features.count


def _rows(piece: Slice, count: int, weight: Tensor) -> Tensor:
    moved = weight.detach().movedim(piece.axis, 0)[piece.start : piece.start + count * piece.width]
    return moved.reshape(count, -1).float().clone()
