"""Which of several healings is best, on text that none of them saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from billhook.anatomy.types import Anatomy
from billhook.data import Windows
from billhook.heal.healing import UNTOUCHED, Healing, carried_out
from billhook.heal.held import parted
from billhook.heal.training.student import Student
from billhook.plan.plan import Plan

Progress = Callable[[str, int, int], None]
Way = Callable[[Any, Anatomy, Plan, Windows, Progress | None], Healing]


@torch.no_grad()
def divergences(model: Any, anatomy: Anatomy, plan: Plan, candidates: Sequence[Healing], ids: Tensor) -> list[float]:
    """Of what ``plan`` leaves of ``model``, with the tensors of each candidate: mean KL from ``model``'s next-token
    distribution over windows ``ids`` [n, length], in nats a token. Each costs a forward of the dense model and of what
    is left."""
    found = []
    for candidate in candidates:
        student = Student(carried_out(model, anatomy, plan, candidate), model, [], "dense")
        found.append(sum(student.parts(row[None].to(model.device))[0].item() for row in ids) / len(ids))
    return found


def judged_apart(way: Way) -> Way:
    """A way to heal that holds nothing back itself, judged: it is given all windows but the last eighth, and on these
    the healed model must be nearer to the dense one than the cut alone; else the healing is refused, its tensors gone.
    Cost: beside its own, two forwards of the dense model and of what is left. InputError for fewer than two windows."""

    def judged(model: Any, anatomy: Anatomy, plan: Plan, windows: Windows, progress: Progress | None) -> Healing:
        fitted, held = parted(windows)
        found = way(model, anatomy, plan, fitted, progress)
        return found.judged(*divergences(model, anatomy, plan, [UNTOUCHED, found], held))

    return judged
