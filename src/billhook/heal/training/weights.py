"""Weights that are trained themselves: copies in float32, for as long as they are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy.undo import Undo
from billhook.heal.healing import put
from billhook.heal.training.as_saved import saved
from billhook.heal.training.sharding import whole


class Weights:
    """Parameters in the blocks of a model, of which the ``chosen`` are trained and ask for gradients.

    A block is awake while any of its own are chosen: all of them are copies in float32 then, for modules whose weights
    differ in dtype do not run everywhere. When it comes to rest they are rounded to the model's dtype, in which it is
    judged and saved (LISA, arXiv 2403.17919, trains in it). A block that was never awake has the weights that it
    shares. ``parameters`` are those of blocks that have ever been awake, by name.

    Whatever its weights are in, a module puts out the model's dtype: not all take a stream in float32.

    Shards keep their dtype, so with ``shard`` all blocks are copies in float32 all along; those at rest are rounded.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Sequence[str],
        names: Sequence[str],
        shard: Callable[[str], None] | None = None,
        chosen: Iterable[str] | None = None,
    ) -> None:
        """``names`` of parameters in the blocks at ``paths``; all of them are chosen at first if nothing is said.
        ``shard`` is called for each block as soon as it has its copies, so that no more than one block is ever whole in
        float32; such a holder cannot be removed."""
        self.model = model
        self.paths = list(paths)
        self.names = list(names)
        self._of = {path: [name for name in names if name.startswith(f"{path}.")] for path in paths}
        self._dtypes = {name: model.get_parameter(name).dtype for name in names}
        self._sharded = shard is not None
        self._awake: set[str] = set()
        self._undo = Undo()
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in names):
            module = model.get_submodule(owner)
            dtype = next(module.parameters()).dtype
            self._undo.then(module.register_forward_hook(partial(_in_dtype, dtype)).remove)
        self.parameters: dict[str, nn.Parameter] = {}
        if shard is not None:
            for path in paths:
                for name in self._of[path]:
                    put(model, name, self._copy(name), Undo())  # the old tensors are not kept
                shard(path)
        self.choose(self.names if chosen is None else chosen)

    @torch.no_grad()
    def choose(self, names: Iterable[str]) -> None:
        """Train these from now on."""
        chosen = set(names)
        awake = {path for path, mine in self._of.items() if not chosen.isdisjoint(mine)}
        for path in self._awake - awake:
            self._rest(path)
        for path in awake - self._awake:
            self._wake(path)
        self._awake = awake
        self.parameters = {name: self.parameters[name] for name in self.names if name in self.parameters}
        for name, parameter in self.parameters.items():
            parameter.requires_grad = name in chosen
            parameter.grad = None

    def _wake(self, path: str) -> None:
        for name in self._of[path]:
            if name in self.parameters and not self._sharded:
                self.parameters[name].data = self._copy(name)
            elif not self._sharded:
                put(self.model, name, self._copy(name), self._undo)
            self.parameters[name] = self.model.get_parameter(name)

    def _copy(self, name: str) -> Tensor:
        return self.model.get_parameter(name).detach().to(torch.float32, copy=True)

    def _rest(self, path: str) -> None:
        for name in self._of[path]:
            parameter = self.parameters[name]
            rounded = parameter.detach().to(self._dtypes[name])
            if self._sharded:
                parameter.copy_(rounded)
            else:
                parameter.data = rounded

    def merged_in(self, path: str) -> dict[str, Tensor]:
        return {name: self.model.get_parameter(name).detach().to(self._dtypes[name]) for name in self._of[path]}

    def place(self, name: str) -> str:
        return name

    def snapshot(self) -> dict[str, Tensor]:
        """What is trained, rounded: all that the weights as they will be saved follow from."""
        return {name: tensor.detach().to(self._dtypes[name], copy=True) for name, tensor in self.parameters.items()}

    def outcome(self, snapshot: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: whole(tensor) for name, tensor in snapshot.items()}

    @contextmanager
    def saved(self) -> Iterator[None]:
        """Inside the context the model computes with the weights as they will be saved."""
        with saved(self):
            yield

    def remove(self) -> None:
        """Put the old parameters back."""
        self._undo.restore()


def _in_dtype(dtype: torch.dtype, _module: nn.Module, _args: Any, output: Any) -> Any:
    return output.to(dtype) if isinstance(output, Tensor) else output
