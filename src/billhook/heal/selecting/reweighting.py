"""Weights of windows by what the cut model still gets wrong in them, or by whose gradients point the right way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from billhook.heal.training.student import Student
from billhook.heal.training.tune import subsets
from billhook.heal.training.weights import Weights
from billhook.plan.errors import InputError

Progress = Callable[[str, int, int], None]


@torch.no_grad()
def losses(student: Student, ids: Tensor, progress: Progress | None = None) -> Tensor:
    """The loss of the student's goal in each window of ``ids`` [n, length], float64 [n], in nats a token. Cost: a
    forward of what is left (and of the dense model, where that is the goal)."""
    found = []
    for number, row in enumerate(ids):
        found.append(student.parts(row[None])[0].double().cpu())
        if progress is not None:
            progress("weighing text", number + 1, len(ids))
    result = torch.stack(found)
    if not result.isfinite().all():
        raise InputError("the loss on the text is not finite: the weights or the text are damaged")
    return result


def by_loss(found: Tensor) -> Tensor:
    """Weights in proportion to exp(min(h + 1, 1)), of sum one, from losses [n]; h is the loss brought to [-1, 1].

    A window that is no longer any trouble counts e times less than one of middling loss, and what is above the middle
    counts alike, so that outliers and noise do not rule.

    Source: Dynamic Loss-Based Sample Reweighting (arXiv 2502.06733), strategy LinUpper with delta = r = 1, the best of
    its strategies. There the weights are those of a batch, taken anew at every step and multiplied with the losses;
    here those of the whole text, taken once before the first step, and windows are drawn by them.
    """
    low, high = found.min(), found.max()
    h = 2 * (found - low) / (high - low).clamp(min=1e-12) - 1
    return torch.softmax((h + 1).clamp(max=1.0), 0)


def alignments(student: Student, ids: Tensor, target: Tensor, progress: Progress | None = None) -> Tensor:
    """The cosine between the gradient of the loss in each window of ``ids`` [n, length] and that in the windows
    ``target`` [m, length'] on average, float64 [n].

    Only gradients with respect to the norms and biases of the blocks are compared: they are few, and every token passes
    through them. Cost: a forward and a backward a window. Raises InputError where there are none.
    """
    options = subsets(student.model, student.paths)
    if not options:
        raise InputError("no biases or norms are left whose gradients could be compared; select text by dsir instead")
    weights = Weights(student.model, student.paths, options[-1])
    try:
        parameters = list(weights.parameters.values())
        total = len(target) + len(ids)
        wanted = torch.zeros(())
        for number, row in enumerate(target):
            wanted = wanted + _gradient(student, row, parameters) / len(target)
            if progress is not None:
                progress("weighing text", number + 1, total)
        found = []
        for number, row in enumerate(ids):
            found.append(torch.cosine_similarity(_gradient(student, row, parameters), wanted, dim=0))
            if progress is not None:
                progress("weighing text", len(target) + number + 1, total)
    finally:
        weights.remove()
    return torch.stack(found)


def by_alignment(found: Tensor) -> Tensor:
    """Weights in proportion to exp(z), of sum one, from alignments [n]; z is the alignment in standard deviations.

    Source: DGA (arXiv 2410.02498), algorithm 1: weights <- weights x exp(step x alignment), normalised. There for
    domains, again and again while training; here for windows, one update from equal weights before the first step. The
    alignment is a cosine rather than an inner product, so that a window does not count for being steep, and the step is
    such that the logarithms of the weights vary by one.
    """
    spread = found.std(unbiased=False)
    return torch.softmax((found - found.mean()) / spread.clamp(min=1e-12), 0)


def _gradient(student: Student, row: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    with student.computing():
        loss = student.parts(row[None])[0]
    slopes = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(slopes, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if slope is None else slope).double().flatten().cpu() for slope, p in pairs])
