"""How far an inner unit can bend what its sublayer writes, by the condition of the matrix that writes it."""

from __future__ import annotations

import torch
from torch import Tensor

from billhook.anatomy import Anatomy
from billhook.measure.width import WidthTrace
from billhook.plan.address import Address
from billhook.scores.registry import score

_RANK = 1e-12  # squared singular values below this share of the largest one are rounding


@score("condition", needs="channels")
def condition(trace: WidthTrace, anatomy: Anatomy) -> dict[Address, Tensor]:
    """kappa(A) |A_u| / |A|, with A = W diag(sqrt(E[x_j^2])): the weight that writes (down, o), its columns as strong as
    what they are given; A_u the columns of unit u (Frobenius norm), |A| the largest singular value, kappa(A) that by
    the smallest one that is not 0.

    The bound of perturbation theory on the relative change of A z when A loses A_u. Within a sublayer |A_u| alone
    orders the units; between sublayers the condition decides, so that an ill-conditioned one, in which little can
    change much, keeps more.

    Source: COMP (arXiv 2501.15255), whose abstract names a metric based on matrix condition and no formula; this one is
    our reading. Cost: one forward pass, and for each sublayer the eigenvalues of a matrix of the smaller side of A.
    """
    found = {}
    for a in trace.units:
        parts = [w.double() * rms[..., None] for w, rms in zip(trace.writes(a), trace.given(a, "rms"), strict=True)]
        columns = torch.cat(parts, 1)  # [units, width, outputs]
        matrix = columns.flatten(0, 1)
        square = matrix.T @ matrix if matrix.shape[0] > matrix.shape[1] else matrix @ matrix.T
        values = torch.linalg.eigvalsh(square)
        smallest = values[values > _RANK * values[-1]].min() if values[-1] > 0 else torch.ones(())
        found[a] = columns.flatten(1).norm(dim=1) / smallest.sqrt()
    return found
