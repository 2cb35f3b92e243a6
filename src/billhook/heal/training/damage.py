"""How much each block lost, and how much that matters, in one pass before any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.heal.training.distil import stream_error
from billhook.heal.training.methods import Features
from billhook.heal.training.student import Student

TAIL = 1 / 4  # the share of the blocks that is the tail
TOKENS = 2048  # looked at


@dataclass(frozen=True)
class Damage:
    """Before training: ``loss``, the divergence from the dense model in nats a token; for each block that stays
    ``errors``, the relative squared error of the stream after it, and ``pull``, the change of the loss to first order
    if that stream were put right."""

    loss: float
    errors: tuple[float, ...]
    pull: tuple[float, ...]


def damage(student: Student, ids: Tensor) -> Damage:
    """One forward and one backward pass over windows [rows, tokens]. ``student`` must learn from the dense model."""
    first = next(parameter for block in student.blocks for parameter in block.parameters())
    asked = first.requires_grad
    first.requires_grad = True  # so that there is a graph from the first block on
    try:
        loss, streams, wanted = student.parts(ids)
        gradients = torch.autograd.grad(loss, streams, allow_unused=True)
    finally:
        first.requires_grad = asked
    pull = [
        0.0 if slope is None else (slope.float() * (goal.float() - now.float())).sum(-1).abs().sum().item()
        for slope, now, goal in zip(gradients, streams, wanted, strict=True)
    ]
    errors = [stream_error(now, goal).item() for now, goal in zip(streams, wanted, strict=True)]
    return Damage(loss.item(), tuple(errors), tuple(pull))


def feature_weights(found: Damage, features: Features) -> dict[int, float]:
    """The weight of each block's feature term: all together begin as large as the divergence.

    Divided by its own size at the start no term dominates (LAPTOP-Diff, arXiv 2404.11098, normalises by the teacher's
    features instead); each then counts in proportion to ``pull``, as HierarchicalPrune (arXiv 2508.04663) lets the
    strength follow the measured sensitivity of a block. ``tail``: only the last quarter, one block at least (FoldGPT,
    arXiv 2407.00928, distils the tail layers). Blocks before the first gap lack nothing and have no term.
    """
    begin = min(len(found.errors) * (1 - TAIL), len(found.errors) - 1) if features == "tail" else 0
    terms = [i for i, error in enumerate(found.errors) if error > 0 and i >= begin and features != "none"]
    total = sum(found.pull[i] for i in terms)
    return {i: found.loss * found.pull[i] / total / found.errors[i] for i in terms} if total > 0 else {}


def sample(ids: Tensor, rows: Sequence[int]) -> Tensor:
    """About ``TOKENS`` tokens of the given windows."""
    return ids[list(rows)[: max(1, TOKENS // ids.shape[1])]]
