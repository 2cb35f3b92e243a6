"""Linears in two parts, and which linears of a sublayer can be taken apart."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy.types import Sublayer
from billhook.plan.outline import LinearOutline


class LowRank(nn.Module):
    """What a linear computes, through ``rank`` channels: ``expand`` [outputs, rank] of ``reduce`` [rank, inputs]."""

    def __init__(self, inputs: int, rank: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.reduce = nn.Linear(inputs, rank, bias=False)
        self.expand = nn.Linear(rank, outputs, bias=bias)

    @property
    def weight(self) -> torch.Tensor:
        """Some models ask a linear for the dtype of its weight, or for the number of its rows."""
        return self.expand.weight

    @property
    def bias(self) -> torch.Tensor:
        return self.expand.bias

    def forward(self, x: torch.Tensor) -> Any:
        return self.expand(self.reduce(x))


def linears(model: nn.Module, sublayer: Sublayer, block: str, uses: Counter[int]) -> dict[str, LinearOutline]:
    """Those reads and writes of a sublayer that can be taken apart, by their path within the ``block``.

    That are modules of their own with a weight of their own (``uses`` counts the modules that hold a parameter, by its
    id), which every token runs through: no fused experts, routers, or parts of an expert.
    """
    found = {}
    for name in (*sublayer.reads, *sublayer.writes):
        path, _, leaf = name.rpartition(".")
        owner: Any = model.get_submodule(path)
        plain = isinstance(owner, nn.Linear) or is_conv(owner)
        if leaf != "weight" or not plain or path.endswith((".reduce", ".expand")) or ".experts." in path:
            continue
        if uses[id(owner.weight)] == 1:
            rows, columns = owner.weight.shape
            outputs, inputs = (columns, rows) if is_conv(owner) else (rows, columns)
            found[path.removeprefix(f"{block}.")] = LinearOutline(outputs=outputs, inputs=inputs)
    return found


def uses(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter, by its id."""
    return Counter(id(own) for module in model.modules() for _, own in module.named_parameters(recurse=False))


def matrix(linear: Any) -> Tensor:
    """The weight of a linear as [outputs, inputs]."""
    weight: Tensor = linear.weight.detach()
    return weight.T if is_conv(linear) else weight


def as_kept(linear: Any, weight: Tensor) -> Tensor:
    """The way back from ``matrix``: [outputs, inputs] as this linear keeps its weight, contiguous."""
    return (weight.T if is_conv(linear) else weight).contiguous()


def is_conv(module: nn.Module) -> bool:
    """Whether it keeps its weight as [inputs, outputs] (GPT-2's Conv1D)."""
    return type(module).__name__ == "Conv1D"
