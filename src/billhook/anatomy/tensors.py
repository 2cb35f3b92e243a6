"""The tensors of one sublayer, by their name within the model, each accounted for once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from billhook.anatomy.low_rank import is_conv
from billhook.anatomy.roles import NotUnderstood
from billhook.anatomy.types import Slice, Sublayer


class Work:
    """What a sublayer computes with, its branch norms aside. ``config`` is the one its modules were built from,
    ``saved`` the one that is written to disk (they differ where a stack works on a private copy)."""

    def __init__(self, model: PreTrainedModel, sublayer: Sublayer, config: Any, saved: Any) -> None:
        self.model, self.sublayer, self.config, self.saved = model, sublayer, config, saved
        norms = tuple(f"{path}." for path in sublayer.norms)
        paths = [cut.path for cut in sublayer.cuts if f"{cut.path}." not in norms]
        self.modules = {
            f"{path}.{name}" if name else path: module
            for path in paths
            for name, module in model.get_submodule(path).named_modules()
        }
        self.left: dict[str, Tensor] = {}
        for path, module in self.modules.items():
            for name, parameter in module.named_parameters(recurse=False):
                if not f"{path}.{name}".startswith(norms):
                    self.left[f"{path}.{name}"] = parameter

    def find(self, leaf: str) -> str | None:
        """The tensor under this name, such as ``q_proj.weight``; not understood where there are several."""
        found = [name for name in self.left if name.endswith(f".{leaf}")]
        if len(found) > 1:
            raise NotUnderstood(f"{leaf} is there {len(found)} times")
        return found[0] if found else None

    def conv(self, name: str) -> bool:
        """Whether a weight is kept as (inputs, outputs)."""
        return is_conv(self.modules[name.rpartition(".")[0]])

    def outputs(self, name: str) -> int:
        return int(self.left[name].shape[1 if self.conv(name) else 0])

    def inputs(self, name: str) -> int:
        return int(self.left[name].shape[0 if self.conv(name) else 1])

    def rows(self, name: str, width: int, starts: Iterable[int] = (0,)) -> list[Slice]:
        """Slices of a linear's outputs, its bias included."""
        slices = [Slice(name, int(self.conv(name)), width, start) for start in starts]
        bias = name.removesuffix(".weight") + ".bias"
        if bias in self.left:
            slices += [Slice(bias, 0, s.width, s.start) for s in slices]
            self.stays(bias)
        self.stays(name)
        return slices

    def columns(self, name: str, width: int) -> list[Slice]:
        """The slice of a writing linear's inputs; its bias belongs to no unit."""
        self.stays(name, name.removesuffix(".weight") + ".bias")
        return [Slice(name, int(not self.conv(name)), width, writes=True)]

    def entries(self, name: str, width: int, writes: bool = False) -> list[Slice]:
        """A slice along the first axis."""
        self.stays(name)
        return [Slice(name, 0, width, writes=writes)]

    def expert_lists(self) -> list[str]:
        """Paths of what holds the experts of a mixture."""
        return [path for path in self.modules if path.rpartition(".")[2] == "experts"]

    def stays(self, *names: str) -> None:
        """Tick off tensors."""
        for name in names:
            self.left.pop(name, None)

    def account(self) -> None:
        """Not understood where a tensor was not ticked off."""
        if self.left:
            name = next(iter(self.left)).removeprefix(f"{self.sublayer.module}.")
            raise NotUnderstood(f"{name} is no part of it that is known")

    def sizes(self, units: int, **wanted: tuple[tuple[str, ...], int]) -> list[tuple[str, str, int]]:
        """The numbers that modules keep: attributes of these names and this value, as (path, name, amount a unit)."""
        return [
            (path, name, value // units)
            for names, value in wanted.values()
            for path, module in self.modules.items()
            for name in names
            if vars(module).get(name) == value and type(value) is int
        ]

    def linear_sizes(self, slices: Iterable[Slice]) -> list[tuple[str, str, int]]:
        """``in_features`` and the like of the linears that are sliced, as (path, name, amount a unit)."""
        amounts: dict[tuple[str, str], int] = {}
        for piece in slices:
            path, _, leaf = piece.parameter.rpartition(".")
            names = ("nx", "nf") if self.conv(piece.parameter) else ("out_features", "in_features")
            if leaf == "weight" and hasattr(self.modules[path], names[piece.axis]):
                place = (path, names[piece.axis])
                amounts[place] = amounts.get(place, 0) + piece.width
        return [(path, name, amount) for (path, name), amount in amounts.items()]

    def stated(self, keys: Iterable[str], value: int) -> str | None:
        """The first of these keys under which the saved config says ``value``, for this block or for all of them."""
        block = self.sublayer.address.block
        for key in keys:
            written = getattr(self.saved, "attribute_map", {}).get(key, key)
            if written in vars(self.saved):
                own = self.saved.per_layer_config[block] if self.saved.is_heterogeneous else self.saved
                if value in (getattr(own, written), vars(self.saved)[written]):
                    return str(written)
        return None
