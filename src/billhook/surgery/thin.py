"""Cutting hidden channels of a residual stream out of a live model, in place.

What is gone is taken for zeros: the smaller model computes what the original one does if every tensor that writes to
the stream writes zeros there. A norm over n channels of which k are not zero divides by the root of the sum of squares
over n; the one over k channels divides by that over k, which is sqrt(n / k) more. So its weight is multiplied by that
(its ``1 + weight`` where that is what it multiplies by), and the two are the same, the epsilon aside. A LayerNorm
subtracts the mean of the channels that stay. An embedding that the model multiplies by the root of the number of
channels grows by as much, and where it is the head too, the final norm makes up for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy import Anatomy, Residual
from billhook.anatomy.config import owners, resolve
from billhook.anatomy.vocabulary import EMBED_SCALE, EMBED_SCALE_TENSOR
from billhook.plan.plan import HiddenChannels

Setter = Callable[[Any, str, Any], None]


def thin(model: nn.Module, anatomy: Anatomy, edits: Iterable[HiddenChannels], put: Setter) -> None:
    """Leave only the kept channels of every tensor on the stream, tell the modules and the config. Tied weights stay
    tied. Copies what stays, a tensor at a time; the tensors that were there are not touched. ``put(owner, name,
    value)`` sets an attribute."""
    for edit in edits:
        residual = anatomy.residuals[edit.stack]
        each = scalings(residual, len(edit.indices))
        made: dict[int, nn.Parameter] = {}
        for name, axis in residual.axes:
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            old = module.get_parameter(leaf)
            if id(old) not in made:
                new = old.detach().index_select(axis, torch.tensor(edit.indices, device=old.device))
                new = each[name](new) if name in each else new
                made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad)
            put(module, leaf, made[id(old)])
        _tell(model, anatomy, residual, len(edit.indices), put)


def _tell(model: nn.Module, anatomy: Anatomy, residual: Residual, left: int, put: Setter) -> None:
    for path, name in residual.attributes:
        put(model.get_submodule(path), name, left)
    for path, name in residual.shapes:
        put(model.get_submodule(path), name, (left,))
    for path in residual.roots:
        module: Any = model.get_submodule(path)
        put(module, EMBED_SCALE, left**0.5)
        put(module, EMBED_SCALE_TENSOR, torch.full_like(getattr(module, EMBED_SCALE_TENSOR), left**0.5))
    for path in owners(anatomy.stack(residual.stack)):
        for name, value in (("hidden_size", left), *residual.states):
            put(resolve(model, path), name, value)


def scalings(residual: Residual, left: int, *, back: bool = False) -> dict[str, Callable[[Tensor], Tensor]]:
    """What becomes of the entries of a tensor when so many channels are left, by the name of the tensor; or what they
    were before (``back``)."""
    root = (left / residual.count if back else residual.count / left) ** 0.5
    return {name: _Scaling(root**power, offset) for name, power, offset in residual.scales}


class _Scaling:
    """w -> factor (offset + w) - offset, computed in float32."""

    def __init__(self, factor: float, offset: float) -> None:
        self.factor, self.offset = factor, offset

    def __call__(self, entries: Tensor) -> Tensor:
        return (self.factor * (self.offset + entries.float()) - self.offset).to(entries.dtype)
