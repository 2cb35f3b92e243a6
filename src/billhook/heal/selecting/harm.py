"""What a cut did to each window of a text, and how the dense model sees it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from billhook.heal.training.distil import divergence
from billhook.heal.training.head import halves
from billhook.heal.training.student import Student
from billhook.measure.patch import observing
from billhook.plan.errors import InputError

Progress = Callable[[str, int, int], None]


@torch.no_grad()
def harmed(
    student: Student, ids: Tensor, progress: Progress | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For windows ``ids`` [n, length]: how far the cut model is from the dense one in each, in nats a token [n], and
    the mean over its tokens of what the head of the dense model reads [n, hidden]. Cost: a forward of each model."""
    harm, points = [], []
    for number, row in enumerate(ids):
        hidden, head, _ = halves(student.model, row[None])
        with observing(student.dense):
            dense, dense_head, _ = halves(student.dense, row[None])
        harm.append(divergence(hidden[0, :-1], head, dense[0, :-1], dense_head).double().cpu())
        points.append(dense[0].double().mean(0).cpu().numpy())
        if progress is not None:
            progress("weighing text", number + 1, len(ids))
    found = torch.stack(harm)
    if not found.isfinite().all():
        raise InputError("the loss on the text is not finite: the weights or the text are damaged")
    return found.numpy(), np.stack(points)
