"""Neurons that go, merged into those that stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy.types import Anatomy
from billhook.heal.healing import Healing
from billhook.measure.features import Features
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.surgery.live import drops_of, keeps_of
from billhook.surgery.narrow import inner_of

Progress = Callable[[str, int, int], None]


def merged_features(
    model: nn.Module,
    anatomy: Anatomy,
    plan: Plan | Iterable[Address],
    source: Any = None,
    progress: Progress | None = None,
) -> Healing:
    """Neurons that go are merged into the nearest ones, as ``measure.features`` merges them: those that stay read the
    mean of what a group reads and write the sum. ``source`` is not looked at: no data is needed.

    Raises InputError where a plan keeps other neurons than the merges leave.
    """
    drops_of(plan, anatomy)  # checks it
    weights = dict(model.named_parameters(remove_duplicate=False))
    tensors: dict[str, Tensor] = {}
    keeps = keeps_of(plan, anatomy)
    for number, keep in enumerate(keeps, start=1):
        inner = inner_of(anatomy, keep)
        features = Features(inner, weights)
        gone = {merge.gone for merge in features.merges(inner.count - len(keep.indices))}
        if set(range(inner.count)) - gone != set(keep.indices):
            raise InputError(f"{keep.unit} keeps other neurons than merging the nearest ones leaves")
        kept = torch.tensor(keep.indices)
        for piece, rows in zip(features.pieces, features.rows, strict=True):
            old = weights[piece.parameter].detach()
            whole = tensors.setdefault(piece.parameter, old.clone())
            entries = (kept * piece.width + piece.start).to(old.device)
            moved = whole.movedim(piece.axis, 0)
            new = rows[kept.to(rows.device)].to(old.dtype)
            moved[entries] = new.reshape(len(kept), *moved.shape[1:])
        if progress is not None:
            progress("merging features", number, len(keeps))
    return Healing(tensors, (), {}, 0, 0)
