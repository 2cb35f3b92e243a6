"""Weights that are trained themselves: copies in float32, in the place of those that are shared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from billhook.anatomy.undo import Undo
from billhook.heal.healing import put


class Weights:
    """Copies in float32 of the named parameters of a model, put in their place. ``parameters`` by name; those that are
    not ``chosen`` ask for no gradient."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.model = model
        self._undo = Undo()
        self._dtypes = {name: model.get_parameter(name).dtype for name in names}
        for name in self._dtypes:
            put(model, name, model.get_parameter(name).detach().float().clone(), self._undo)
        self.parameters = {name: model.get_parameter(name) for name in self._dtypes}
        self.choose(self.parameters)

    def choose(self, names: Iterable[str]) -> None:
        """Train these for now."""
        chosen = set(names)
        for name, parameter in self.parameters.items():
            parameter.requires_grad = name in chosen
            parameter.grad = None

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """As they are to be saved, in the model's dtype."""
        return {name: parameter.detach().to(self._dtypes[name]) for name, parameter in self.parameters.items()}

    @contextmanager
    def saved(self) -> Iterator[None]:
        """Inside the context the model computes with the weights as they will be saved."""
        undo = Undo()
        try:
            for name, tensor in self.merged().items():
                put(self.model, name, tensor, undo)
            yield
        finally:
            undo.restore()

    def remove(self) -> None:
        """Put the old parameters back."""
        self._undo.restore()
