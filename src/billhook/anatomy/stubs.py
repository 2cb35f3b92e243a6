"""What stands in the place of a module that was cut. Stubs hold no weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def _stream(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs["hidden_states"]


class Zero(nn.Module):
    """Writes nothing: the stream after it is the stream before it. A fresh tensor, since callers may add in place."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.zeros_like(_stream(args, kwargs))


class ZeroPair(nn.Module):
    """As Zero, for modules that return (output, attention weights)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.zeros_like(_stream(args, kwargs)), None


class Identity(nn.Module):
    """Hands its input on."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _stream(args, kwargs)


class Residual(nn.Module):
    """For modules that add the residual themselves: forward(hidden_states, residual) -> residual."""

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return residual


class ResidualPair(nn.Module):
    """As Residual, for modules that return (output, attention weights)."""

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return residual, None


class PassBias(nn.Module):
    """For sublayers that add to the stream themselves and hand a shared position bias on."""

    def forward(self, *args: Any, position_bias: Any = None, **kwargs: Any) -> Any:
        return _stream(args, kwargs), position_bias, None


STUBS: dict[str, type[nn.Module]] = {
    "zero": Zero,
    "zero_pair": ZeroPair,
    "identity": Identity,
    "residual": Residual,
    "residual_pair": ResidualPair,
    "pass_bias": PassBias,
}
