"""Which write linears can be refitted: those whose output is added to the stream, times a constant for each channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from billhook.anatomy.low_rank import is_conv
from billhook.anatomy.types import Sublayer
from billhook.heal.refit.ridge import Moments
from billhook.heal.refit.watch import keep_input
from billhook.measure.patch import Forward

FUSED = "fused experts, each of which sees few of the tokens"
MIXED = "its block does more with the stream than add to it"
NOT_ADDED = "what it writes is not added to the stream as it is, but normed"
_TOLERANCE = 0.03  # relative; what bfloat16 leaves of a sum is 0.004 of its larger term
_SMALLEST = 0.01  # a channel that hardly reaches the stream cannot be steered through it


@dataclass(frozen=True)
class Write:
    """A linear that writes. ``transposed``: it keeps its weight as [inputs, outputs] (GPT-2's Conv1D)."""

    weight: str
    linear: nn.Module
    transposed: bool
    sums: ClassVar = Moments

    @property
    def bias(self) -> str | None:
        found = getattr(self.linear, "bias", None)
        return None if found is None else f"{self.weight.removesuffix('weight')}bias"

    def watch(self, kept: list[Tensor]) -> tuple[nn.Module, Forward]:
        """A hook that gathers what ``inputs`` and ``written`` are asked with."""
        return self.linear, partial(keep_input, kept)

    def inputs(self, h: Tensor) -> Tensor:
        """The inputs [..., i] as the regression sees them: with a constant 1 behind where there is a bias."""
        return h if self.bias is None else torch.cat([h, torch.ones_like(h[..., :1])], -1)

    def changed(self, change: Tensor) -> dict[str, Tensor]:
        """New parameters by name, for a change [i, o] of what ``inputs`` are multiplied with."""
        old: Any = self.linear.weight
        rows = change[:-1] if self.bias is not None else change
        new = {self.weight: (old.detach().float() + (rows if self.transposed else rows.T)).to(old.dtype)}
        if self.bias is not None:
            bias: Any = self.linear.bias
            new[self.bias] = (bias.detach().float() + change[-1]).to(bias.dtype)
        return new

    def written(self, h: Tensor, new: dict[str, Tensor]) -> Tensor:
        """By how much the output changes with new parameters [n, o], rounding to their dtype included."""
        weight: Any = self.linear.weight
        step = (new[self.weight].float() - weight.detach().float()).to(h.dtype)
        out: Tensor = h @ (step if self.transposed else step.T)
        if self.bias is not None:
            bias: Any = self.linear.bias
            out = out + (new[self.bias].float() - bias.detach().float()).to(h.dtype)
        return out


def writes_of(model: nn.Module, sublayer: Sublayer, mixed: bool) -> tuple[list[Write], dict[str, str]]:
    """The write linears of a sublayer that structure alone does not rule out, and why the others are left alone."""
    found: list[Write] = []
    left: dict[str, str] = {}
    for name in sublayer.writes:
        linear = model.get_submodule(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if mixed:
            left[name] = MIXED
        elif linear is None or model.get_parameter(name).ndim != 2:
            left[name] = FUSED
        else:
            found.append(Write(name, linear, is_conv(linear)))
    return found, left


def scale_of(run: Callable[[Forward | None], Tensor]) -> Tensor | None:
    """What a module's output is multiplied with before it is added to the stream, [o]; None where that is no constant
    of the channel.

    Found out by trying: noise as large as the stream is added to the output of the module, and compared with what
    arrives in the stream. ``run(hook)`` gives the stream [rows, tokens, o], with a forward hook on the module. So layer
    scales and residual multipliers are taken into account, and norms behind a linear found, whoever has them.
    """
    before = run(None).float()
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, before.shape, generator=generator).to(before.device) * 2.0 - 1
    noise = signs * (before.abs() + before.abs().mean())

    def disturb(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return (output.float() + noise.reshape(output.shape)).to(output.dtype)

    arrived = run(disturb).float() - before
    over = tuple(range(before.ndim - 1))
    scale = (arrived * noise).sum(over) / noise.square().sum(over)
    off = (arrived - scale * noise).norm() / arrived.norm()
    usable = bool((scale.abs() > _SMALLEST * scale.abs().max()).all())
    return scale if usable and off < _TOLERANCE else None
