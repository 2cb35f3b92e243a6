"""The experts of a mixture in two parts each, and which mixtures can be taken apart so."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from billhook.anatomy.mixtures import gated, is_usual
from billhook.anatomy.types import Sublayer
from billhook.anatomy.vocabulary import DOWN, GATE_UP
from billhook.plan.outline import MixtureOutline


class LowRankExperts(nn.Module):
    """Experts whose first ``rank`` neurons are whole; the linears of the others go through ``rank`` channels.

    Called as the experts that it stands for: tokens [n, hidden], the experts picked for each [n, k] and their weights
    [n, k].
    """

    reads: nn.Parameter
    writes: nn.Parameter
    reads_reduce: nn.Parameter
    reads_expand: nn.Parameter
    writes_reduce: nn.Parameter
    writes_expand: nn.Parameter

    def __init__(self, experts: int, hidden: int, neurons: int, rank: int, act_fn: nn.Module) -> None:
        super().__init__()
        self.neurons, self.act_fn = neurons, act_fn
        shapes = {
            "reads": (2 * rank, hidden),
            "writes": (hidden, rank),
            "reads_reduce": (rank, hidden),
            "reads_expand": (2 * (neurons - rank), rank),
            "writes_reduce": (rank, neurons - rank),
            "writes_expand": (hidden, rank),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(experts, *shape)))

    def gated(self, x: torch.Tensor) -> Any:
        gate, up = x.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, tokens: torch.Tensor, picked: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        linear, out = nn.functional.linear, torch.zeros_like(tokens)
        for e in torch.unique(picked).tolist():
            token, slot = torch.where(picked == e)
            x = tokens[token]
            whole = linear(self.gated(linear(x, self.reads[e])), self.writes[e])
            others = self.gated(linear(linear(x, self.reads_reduce[e]), self.reads_expand[e]))
            others = linear(linear(others, self.writes_reduce[e]), self.writes_expand[e])
            out.index_add_(0, token, ((whole + others) * weights[token, slot, None]).to(out.dtype))
        return out


#: Those parameters that write to the residual stream.
WRITES = ("writes", "writes_expand")


def mixtures(model: nn.Module, sublayer: Sublayer, block: str) -> dict[str, MixtureOutline]:
    """The experts of a sublayer by their path within the ``block``, where they can be taken apart: gate above up in one
    tensor [experts, 2 neurons, hidden], down in another [experts, hidden, neurons], no biases, the usual gate."""
    found = {}
    for inside, module in model.get_submodule(sublayer.module).named_modules():
        names = {name for name, _ in module.named_parameters()}
        if inside.rpartition(".")[2] != "experts" or names != {GATE_UP, DOWN}:
            continue
        experts: Any = module
        if is_usual(experts) and isinstance(experts.act_fn, nn.Module):
            count, hidden, neurons = gated(experts)[1].shape
            path = f"{sublayer.module}.{inside}".removeprefix(f"{block}.")
            found[path] = MixtureOutline(experts=count, hidden=hidden, neurons=neurons)
    return found
