"""The best low-rank map from one change of a stream to another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy, Block
from billhook.anatomy.undo import Undo
from billhook.data import Windows
from billhook.plan.address import Address
from billhook.runtime.counts import Counts
from billhook.runtime.online import Online, Pass, Skip

Factors = tuple[Tensor, Tensor]
"""A [hidden, rank] and B [rank, hidden] of the map x -> A B x."""

DAMPING = 1e-2


def fit_factors(
    model: PreTrainedModel,
    anatomy: Anatomy,
    units: Sequence[Address],
    windows: Windows,
    *,
    rank: int,
    residual: bool,
) -> dict[Address, Factors]:
    """For each block with stream x in and y out, the A B of rank at most ``rank`` that minimises, over all consecutive
    tokens of the windows in the plain model, the squared error of A B (x[t] - x[t-1]) against y[t] - y[t-1], or against
    that less x[t] - x[t-1] where the map stands beside the residual path (``residual``).

    Reduced-rank regression (Izenman 1975): ridge solution W, then A B = V V' W with V the leading eigenvectors of
    W S W', S the second moment of the changes. The ridge is ``DAMPING`` times the mean of S's diagonal. Sums and
    solutions are float64. Cost: one pass, and two hidden² sums a block.
    """
    sums = _Sums(frozenset(units), residual)
    undo = Undo()
    Online(model, anatomy, sums, {unit.stack for unit in units}, Counts()).fit(undo)
    try:
        with torch.no_grad():
            for ids in windows.ids:
                model(input_ids=ids[None].to(model.device), use_cache=False)
    finally:
        undo.restore()
    return {unit: reduced_rank(*sums.of[unit], rank) for unit in units}


def reduced_rank(inputs: Tensor, cross: Tensor, rank: int) -> Factors:
    """From S = sum x x' and C = sum z x' (both [d, d], float64), the factors of the best map x -> z of that rank."""
    ridge = DAMPING * inputs.diagonal().mean() * torch.eye(len(inputs), dtype=inputs.dtype, device=inputs.device)
    solution = torch.linalg.solve(inputs + ridge, cross.T).T
    _, vectors = torch.linalg.eigh(solution @ inputs @ solution.T)
    leading = vectors[:, -rank:]
    return leading, leading.T @ solution


class _Sums:
    """A trigger that leaves nothing out and adds up what it sees."""

    def __init__(self, units: frozenset[Address], residual: bool) -> None:
        self.of: dict[Address, tuple[Tensor, Tensor]] = {}
        self._units, self._residual = units, residual

    def begin(self, now: Pass) -> None:
        pass

    def decide(self, block: Block, stream: Tensor, now: Pass) -> Skip | None:
        return None

    def saw(self, block: Block, before: Tensor, after: Tensor, now: Pass) -> None:
        if block.address not in self._units:
            return
        x = before.double().diff(dim=1).flatten(0, 1)
        z = after.double().diff(dim=1).flatten(0, 1)
        z = z - x if self._residual else z
        inputs, cross = self.of.get(block.address, (0.0, 0.0))
        self.of[block.address] = (inputs + x.T @ x, cross + z.T @ x)

    def saw_mlp(self, block: Block, before: Tensor, after: Tensor, now: Pass) -> None:
        pass
