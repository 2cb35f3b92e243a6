"""Which single weights stay: the most salient ones of each group that is compared."""

from __future__ import annotations

import torch
from torch import Tensor

Pattern = tuple[int, int] | None
"""(N, M): at most N of M inputs in a row. None: unstructured."""


def spread(sizes: Tensor, share: float) -> Tensor:
    """How many of so many members each group keeps, so that all groups from the first on together keep ``share`` of
    their members, rounded down: int64 [groups]."""
    ends = (sizes.double().cumsum(0) * share + 1e-9).floor().long()
    return torch.diff(ends, prepend=ends.new_zeros(1))


def most_salient(saliency: Tensor, left: Tensor) -> Tensor:
    """Which members [groups, n] are among the ``left`` [groups] most salient of their group. Of equals the first."""
    order = saliency.argsort(dim=1, descending=True, stable=True)
    kept = torch.arange(saliency.shape[1], device=saliency.device) < left.to(saliency.device)[:, None]
    return torch.zeros_like(kept).scatter_(1, order, kept)


def chosen(saliency: Tensor, share: float, pattern: Pattern, by_row: bool) -> Tensor:
    """The mask [outputs, inputs] of a linear that keeps ``share`` of its weights: compared within each output where
    ``by_row``, else within the whole linear; with a pattern N:M within each M inputs of an output, of which N stay, or
    fewer where the share asks for it. Cost: a sort."""
    rows, width = saliency.shape
    size = pattern[1] if pattern else width if by_row else rows * width
    kept = min(share, pattern[0] / pattern[1]) if pattern else share
    groups = saliency.reshape(-1, size)
    left = spread(torch.full((len(groups),), size), kept)
    return most_salient(groups, left).reshape(rows, width)
