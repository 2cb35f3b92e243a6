"""Second moments of what the linears of a block are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from billhook.anatomy.types import Block
from billhook.heal.refit.places import at_once
from billhook.heal.refit.stepping import Stepper
from billhook.measure.patch import Forward
from billhook.plan.errors import InputError


def moments(stepper: Stepper, block: Block, names: Sequence[str], streams: Sequence[Tensor]) -> dict[str, Tensor]:
    """The sum of x x' over the tokens x that each linear of a block is given, by the name of its weight: float32
    [i, i]. ``streams`` are those at the block, one a batch. Cost: the block once. InputError for a linear that no token
    reaches."""
    found: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}

    def keep(name: str) -> Forward:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given[name] = args[0]

        return hook

    hooks = [(stepper.model.get_submodule(name.rpartition(".")[0]), keep(name)) for name in names]
    for i, stream in enumerate(streams):
        stepper.run(i, at_once(block), stream, (), hooks)
        real = stepper.real(i, stream).reshape(-1)
        sums: dict[int, Tensor] = {}  # q, k and v are given one and the same
        for name, x in given.items():
            if id(x) not in sums:
                rows = x.reshape(-1, x.shape[-1]).float()
                rows = rows[real] if len(rows) == len(real) else rows  # routed or crossed: not the stream's own tokens
                sums[id(x)] = rows.T @ rows
            found[name] = found[name] + sums[id(x)] if name in found else sums[id(x)]
        given.clear()
    for name in names:
        if name not in found or not found[name].diagonal().sum() > 0:
            raise InputError(f"the calibration gives {name} nothing to see; use more text")
    return found
