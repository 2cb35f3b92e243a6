"""Scales that are trained: a factor for each output of a linear, beside weights that are trained themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from billhook.anatomy.low_rank import is_conv
from billhook.heal.training.as_saved import merged_from, saved
from billhook.heal.training.weights import Weights

_END = ".scale"


class Scaled(Weights):
    """``Weights``, of which some are the scales of linears: W x + b becomes s (W x + b) with s [outputs] in float32,
    which begins at one. Saved as W <- s W and b <- s b: no tensor more, and what is zero stays zero. In bfloat16 an s
    within a fifth of a percent of one changes nothing, neither here nor as saved, so very short steps show nothing.

    Source: PERP (arXiv 2312.15230), whose ScaleLoRA multiplies W with B A, elementwise; here of rank one without the
    factors of the inputs. Those of reads are the gain of the norm before them, those of writes the scales of what is
    written there, but where several heads have one value or an activation stands between."""

    def __init__(
        self,
        model: nn.Module,
        paths: Sequence[str],
        names: Sequence[str],
        shard: Callable[[str], None] | None = None,
    ) -> None:
        """``names`` as ``Weights`` has them, and those of scales (see ``scales_of``)."""
        self._linears = [name.removesuffix(_END) for name in names if name.endswith(_END)]
        self._hooks: list[RemovableHandle] = []
        for linear in self._linears:
            layer = model.get_submodule(linear)
            weight: Any = layer.weight
            layer.scale = nn.Parameter(torch.ones(weight.shape[1 if is_conv(layer) else 0], device=weight.device))
        super().__init__(model, paths, names, shard)
        self._hook()

    def merged_in(self, path: str) -> dict[str, Tensor]:
        new = super().merged_in(path)
        for linear in (linear for linear in self._linears if linear.startswith(f"{path}.")):
            scale = new.pop(linear + _END)
            layer = self.model.get_submodule(linear)
            factors = {"weight": scale if is_conv(layer) else scale[:, None], "bias": scale}
            for leaf, factor in factors.items():
                old = new.get(f"{linear}.{leaf}", getattr(layer, leaf))  # rounded, as a snapshot has it
                if old is not None:
                    new[f"{linear}.{leaf}"] = (old.detach().float() * factor).to(old.dtype)
        return new

    def outcome(self, snapshot: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return merged_from(self, snapshot)

    @contextmanager
    def saved(self) -> Iterator[None]:
        """Inside the context the model computes with the merged weights, exactly as they will be saved."""
        self._unhook()
        try:
            with saved(self):
                yield
        finally:
            self._hook()

    def remove(self) -> None:
        super().remove()
        self._unhook()
        for linear in self._linears:
            del self.model.get_submodule(linear).scale

    def _hook(self) -> None:
        self._hooks = [self.model.get_submodule(linear).register_forward_hook(_times) for linear in self._linears]

    def _unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()


def scales_of(model: nn.Module, linears: Iterable[str]) -> list[str]:
    """Names of the scales that these linears would have; none for one whose weight is that of another, too."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    weights = {linear: model.get_parameter(f"{linear}.weight") for linear in linears}
    return [linear + _END for linear, weight in weights.items() if uses[id(weight)] == 1]


def _times(layer: Any, _: Any, output: Tensor) -> Tensor:
    scaled: Tensor = (output * layer.scale).to(output.dtype)  # s itself is never rounded
    return scaled
