"""Masks and new weights by the optimal brain surgeon, one linear at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from billhook.search.masks import Pattern, most_salient, spread

DAMPING = 0.01  # of the mean energy of an input
BLOCK = 128  # inputs


def second_order(weight: Tensor, gram: Tensor, share: float, pattern: Pattern = None) -> tuple[Tensor, Tensor]:
    """A mask [o, i] that keeps ``share`` of a weight W [o, i], and the new W (float32, zero outside the mask) that
    makes good what the mask takes, both for inputs with the Gram matrix ``gram`` [i, i] = sum over tokens of x x'.

    With H = gram + damping, and C the upper Cholesky factor of H^-1, inputs are gone through in order, in blocks of
    128. At the start of a block the weights with the smallest w^2 / C_jj^2 in it go (all outputs are compared; with a
    pattern N:M those of each output when the M inputs are reached). Each weight that goes, w of input j, changes those
    behind it by -w / C_jj C_j: what keeps the squared error of the output least, the inputs before j being settled.

    Source: SparseGPT (arXiv 2301.00774), algorithm 1, block size and damping as in section 4. There inputs without any
    energy lose all their weights; here the damping alone gives them theirs, and they are the first to go. The share is
    met in each block, as there. Cost: i^3 + o i^2 multiplications, in float64 for the inverse.
    """
    rows, width = weight.shape
    size = BLOCK if pattern is None else BLOCK // pattern[1] * pattern[1]
    new = weight.float().clone()
    kept = torch.ones_like(new, dtype=torch.bool)
    factor = _factor(gram)
    starts = range(0, width, size)
    sizes = torch.tensor([rows * (min(start + size, width) - start) for start in starts])
    left = spread(sizes, share)
    groups = (
        None
        if pattern is None
        else spread(torch.full((rows * width // pattern[1],), pattern[1]), _kept(share, pattern))
    )
    for number, start in enumerate(starts):
        end = min(start + size, width)
        part, c = new[:, start:end], factor[start:end, start:end]
        diagonal = c.diagonal()
        errors = torch.zeros_like(part)
        mask = kept[:, start:end]
        if pattern is None:
            saliency = (part / diagonal).square()
            mask.copy_(most_salient(saliency.reshape(1, -1), left[number : number + 1]).reshape(mask.shape))
        for j in range(end - start):
            if groups is not None and pattern is not None and j % pattern[1] == 0:
                here = slice(j, j + pattern[1])
                many = groups.reshape(rows, -1)[:, (start + j) // pattern[1]]
                mask[:, here] = most_salient((part[:, here] / diagonal[here]).square(), many)
            error = torch.where(mask[:, j], 0.0, part[:, j]) / c[j, j]
            part[:, j:] -= error[:, None] * c[j, j:]
            errors[:, j] = error
        new[:, end:] -= errors @ factor[start:end, end:]
    return kept, torch.where(kept, new, 0.0)


def _kept(share: float, pattern: tuple[int, int]) -> float:
    return min(share, pattern[0] / pattern[1])


def _factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Gram matrix, float32."""
    system = gram.double()
    system = system + DAMPING * system.diagonal().mean() * torch.eye(
        len(system), dtype=system.dtype, device=gram.device
    )
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
