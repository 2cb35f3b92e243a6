"""Which of several healings is best, on text that none of them saw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from billhook.anatomy.types import Anatomy
from billhook.heal.healing import Healing, healed
from billhook.heal.student import Student
from billhook.plan.plan import Plan
from billhook.surgery import apply


@torch.no_grad()
def divergences(model: Any, anatomy: Anatomy, plan: Plan, candidates: Sequence[Healing], ids: Tensor) -> list[float]:
    """Of what ``plan`` leaves of ``model``, with the tensors of each candidate: mean KL from ``model``'s next-token
    distribution over windows ``ids`` [n, length], in nats a token. Each costs a forward of the dense model and of what
    is left."""
    found = []
    for candidate in candidates:
        with healed(model, candidate):
            cut = apply(model, anatomy, plan)
        student = Student(cut, model, [], "dense")
        found.append(sum(student.parts(row[None].to(model.device))[0].item() for row in ids) / len(ids))
    return found
