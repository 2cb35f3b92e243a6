"""Weights that are trained themselves: copies in float32, in the place of those that are shared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from billhook.anatomy.undo import Undo
from billhook.heal.healing import put
from billhook.heal.training.as_saved import saved


class Weights:
    """Copies in float32 of parameters of a model, put in their place. ``parameters`` by name; those that are not
    ``chosen`` ask for no gradient."""

    def __init__(
        self,
        model: nn.Module,
        paths: Sequence[str],
        names: Sequence[str],
        shard: Callable[[str], None] | None = None,
    ) -> None:
        """``names`` of parameters in the blocks at ``paths``. ``shard`` is called for each block as soon as it has its
        copies, so that no more than one block is ever whole in float32; such a holder cannot be removed."""
        self.model = model
        self.paths = list(paths)
        self._of = {path: [name for name in names if name.startswith(f"{path}.")] for path in paths}
        self._dtypes = {name: model.get_parameter(name).dtype for name in names}
        self._undo = Undo()
        for path in paths:
            for name in self._of[path]:
                put(model, name, model.get_parameter(name).detach().float().clone(), self._undo)
            if shard is not None:
                shard(path)
                self._undo = Undo()  # the old tensors are not kept for its sake
        self.parameters = {name: model.get_parameter(name) for name in names}
        self.choose(self.parameters)

    def choose(self, names: Iterable[str]) -> None:
        """Train these for now."""
        chosen = set(names)
        for name, parameter in self.parameters.items():
            parameter.requires_grad = name in chosen
            parameter.grad = None

    def merged_in(self, path: str) -> dict[str, Tensor]:
        return {name: self.model.get_parameter(name).detach().to(self._dtypes[name]) for name in self._of[path]}

    def place(self, name: str) -> str:
        return name

    @contextmanager
    def saved(self) -> Iterator[None]:
        """Inside the context the model computes with the weights as they will be saved."""
        with saved(self):
            yield

    def remove(self) -> None:
        """Put the old parameters back."""
        self._undo.restore()
