"""What the linears that read are given, gathered while a place runs."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from billhook.measure.patch import Forward
from billhook.plan.address import Address

Seen = dict[Address, tuple[dict[str, nn.Module], dict[str, list[Tensor]]]]
"""For each sublayer the linears that read, by the names of their weights, and what they were given, batch by batch."""


def watching(seen: Seen) -> list[tuple[nn.Module, Forward]]:
    """Hooks that gather what reads are given."""
    pairs = [(linear, given[name]) for reads, given in seen.values() for name, linear in reads.items()]
    return [(linear, partial(keep_input, inputs)) for linear, inputs in pairs]


def keep_input(kept: list[Tensor], module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    kept.append(args[0])


def keep_output(kept: list[Tensor], module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    kept.append(output)
