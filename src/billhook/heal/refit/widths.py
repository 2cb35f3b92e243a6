"""From the tensors of a cut model to those of the original: by its names, and in its shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from billhook.anatomy.types import Anatomy
from billhook.heal.refit.on_disk import on_disk
from billhook.plan.address import Address
from billhook.plan.check import survivors
from billhook.plan.plan import HiddenChannels, Keep
from billhook.surgery.narrow import inner_of, kept_entries
from billhook.surgery.thin import scalings


def whole(
    model: nn.Module,
    anatomy: Anatomy,
    keeps: Iterable[Keep],
    tensors: Mapping[str, Tensor],
    channels: Iterable[HiddenChannels] = (),
) -> dict[str, Tensor]:
    """``tensors``, by name in the original ``model``, with those that have lost units or hidden channels put into a
    copy of what the model has there: the kept entries are new, the others are old and go with the cut. So new weights
    are exchanged on the original model first, and the cut takes exactly them."""
    found = dict(tensors)
    keeps = tuple(keeps)
    for edit in channels:
        residual = anatomy.residuals[edit.stack]
        before = scalings(residual, len(edit.indices), back=True)
        for name, axis in residual.axes:
            if name in found:
                full = inner_left(model, anatomy, keeps, name).clone()
                new = before[name](found[name]) if name in before else found[name]
                found[name] = on_disk(
                    full.index_copy_(axis, torch.tensor(edit.indices, device=full.device), new.to(full))
                )
    for keep in keeps:
        for name, (axis, left) in kept_entries(inner_of(anatomy, keep), keep.indices).items():
            if name in found:
                full, new = model.get_parameter(name).detach().clone(), found[name]
                found[name] = _put(full, axis, left, new)
    return found


def _put(full: Tensor, axis: int, entries: Sequence[int], new: Tensor) -> Tensor:
    return on_disk(full.index_copy_(axis, torch.tensor(entries, device=full.device), new.to(full)))


def inner_left(model: nn.Module, anatomy: Anatomy, keeps: Iterable[Keep], name: str) -> Tensor:
    """What keeps leave of the inner units of a tensor of the original model, all hidden channels being there."""
    tensor = model.get_parameter(name).detach()
    for keep in keeps:
        axis, left = kept_entries(inner_of(anatomy, keep), keep.indices).get(name, (0, None))
        if left is not None:
            tensor = tensor.index_select(axis, torch.tensor(left, device=tensor.device))
    return tensor


def original_names(anatomy: Anatomy, drops: frozenset[Address], names: Iterable[str]) -> dict[str, str]:
    """Names of parameters in the cut model -> in the original, where blocks have other numbers."""
    moved = {
        f"{stack.path}.{new}.": f"{stack.path}.{old}."
        for stack in anatomy.stacks
        for new, old in enumerate(survivors(drops, anatomy.outline, stack.name))
    }
    found = {}
    for name in names:
        prefix = next((prefix for prefix in moved if name.startswith(prefix)), "")
        found[name] = moved.get(prefix, "") + name.removeprefix(prefix)
    return found
