"""A block that works on some of its tokens only, on a model whose module tree stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy import Block
from billhook.anatomy.types import Sublayer
from billhook.anatomy.vocabulary import QUERIES, ROUTERS
from billhook.runtime.silence import Detour, Forward, width_of


class Sparing:
    """The linears of one block that are computed for the tokens in ``run`` alone; the others' outputs are zeros.

    ``on(run)`` until ``off()``. Of an MLP that is all its linears and its experts; of an attention, those of queries
    (where they are linears of their own) and output. Keys and values are made for every token, from the stream as it
    comes in, and the mixing is computed for all: what the block returns is right for the tokens in ``run``, and for
    the others it is to be thrown away. Routers, norms and activations run for all tokens.
    """

    def __init__(self, model: nn.Module, block: Block) -> None:
        self._run = torch.zeros(0, dtype=torch.bool)
        modules = dict.fromkeys(name.rpartition(".")[0] for sub in block.sublayers for name in _spared(sub))
        self._detours = [self._detour(model.get_submodule(path)) for path in modules]

    def on(self, run: Tensor) -> None:
        """Work for the tokens where ``run`` [rows, tokens] is true."""
        self._run = run.flatten()
        for detour in self._detours:
            detour.on()

    def off(self) -> None:
        for detour in self._detours:
            detour.off()

    def _detour(self, module: nn.Module) -> Detour:
        if getattr(module, "weight", None) is None:
            return Detour(module, self._experts(module.forward))
        return Detour(module, self._linear(module.forward, width_of(module)))

    def _linear(self, original: Forward, width: int) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            some: Tensor = original(x.reshape(-1, x.shape[-1])[self._run])
            return _among(some, self._run, width).reshape(*x.shape[:-1], width)

        return forward

    def _experts(self, original: Forward) -> Callable[..., Tensor]:
        def forward(hidden: Tensor, *picked: Any) -> Tensor:
            if not self._run.any():
                return torch.zeros_like(hidden)
            some: Tensor = original(hidden[self._run], *(each[self._run] for each in picked))
            return _among(some, self._run, hidden.shape[-1])

        return forward


def _spared(sublayer: Sublayer) -> list[str]:
    """The weights of a sublayer that need not be multiplied with for a token that it is left out for."""
    leaves = {name: name.removesuffix(".weight").rpartition(".")[2] for name in (*sublayer.reads, *sublayer.writes)}
    if sublayer.kind == "mlp":
        return [name for name, leaf in leaves.items() if leaf not in ROUTERS]
    return [name for name, leaf in leaves.items() if name in sublayer.writes or leaf in QUERIES]


def _among(some: Tensor, where: Tensor, width: int) -> Tensor:
    """Rows [n, width] at their places among all, zeros elsewhere."""
    return some.new_zeros(len(where), width).masked_scatter(where[:, None], some)
