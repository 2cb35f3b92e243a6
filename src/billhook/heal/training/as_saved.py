"""A model that computes as it will be saved, while what is trained stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from billhook.anatomy.undo import Undo
from billhook.heal.healing import put
from billhook.heal.training.sharding import gathered


class Holder(Protocol):
    """Who has the parameters of a training: in ``model``, in the blocks at ``paths``."""

    model: nn.Module
    paths: list[str]
    parameters: dict[str, nn.Parameter]

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of what is trained, as far as the weights to be saved follow from it."""

    def outcome(self, snapshot: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The new weights that follow from it, whole, as ``merged_in`` has them."""

    def merged_in(self, path: str) -> dict[str, Tensor]:
        """The new weights of one block as they are to be saved, by name in the model as it will be, in its dtype."""

    def place(self, name: str) -> str:
        """Where the model has a weight of that name just now."""


@torch.no_grad()
def merged(holder: Holder) -> dict[str, Tensor]:
    """The new weights of all blocks as they are to be saved, by name."""
    new: dict[str, Tensor] = {}
    for path in holder.paths:
        with gathered(holder.model.get_submodule(path)):
            new |= {name: tensor.detach().clone() for name, tensor in holder.merged_in(path).items()}
    return new


@torch.no_grad()
def merged_from(holder: Holder, snapshot: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As ``merged``, of what was trained as it was then."""
    for name, parameter in holder.parameters.items():
        parameter.copy_(snapshot[name])
    return merged(holder)


@contextmanager
def saved(holder: Holder) -> Iterator[None]:
    """Inside the context each block computes with the merged weights, exactly as they will be saved: they are made when
    it begins and gone when it ends."""
    undo = Undo()
    handles = []

    def before(path: str) -> Any:
        def merge(*_: Any) -> None:
            with torch.no_grad():
                for name, tensor in holder.merged_in(path).items():
                    put(holder.model, holder.place(name), tensor, undo)

        return merge

    def after(*_: Any) -> None:
        undo.restore()

    try:
        for path in holder.paths:
            block = holder.model.get_submodule(path)
            handles.append(block.register_forward_pre_hook(before(path)))
            handles.append(block.register_forward_hook(after, prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        undo.restore()
