"""A norm behind what a sublayer writes: each channel of what it puts out times a factor, by least squares."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from billhook.anatomy.types import Sublayer
from billhook.heal.refit.plain_norms import gain_of
from billhook.heal.refit.ridge import Moments
from billhook.heal.refit.watch import keep_output
from billhook.measure.patch import Forward


class ChannelMoments(Moments):
    """Sums over tokens for a change d [o] that multiplies each channel by itself: with inputs y [o] and a residual
    r [o], ``inputs`` = sum w y^2 [o], ``cross`` = sum w y r [o], and the error is sum w |r - d y|^2."""

    @staticmethod
    def products(h: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return h.square().sum(0), (h * r).sum(0)

    @property
    def scale(self) -> Tensor:
        return self.inputs.mean().double()

    def times(self, change: Tensor) -> Tensor:
        return self.inputs.double() * change

    def change(self, penalty: Tensor) -> Tensor | None:
        return (self.cross.double() / (self.inputs.double() + penalty)).float()


@dataclass(frozen=True)
class Norm:
    """A norm that stands between the writes of a sublayer and the stream, to be changed as a ``Write`` is. ``gain``
    [o], float32, is what it multiplies with, however its weight says it."""

    weight: str
    module: nn.Module
    gain: Tensor
    sums: ClassVar = ChannelMoments

    def watch(self, kept: list[Tensor]) -> tuple[nn.Module, Forward]:
        return self.module, partial(keep_output, kept)

    def inputs(self, y: Tensor) -> Tensor:
        """What is multiplied: what the norm puts out."""
        return y

    def changed(self, change: Tensor) -> dict[str, Tensor]:
        """The new weight by name, with which (1 + ``change``) times as much comes out of each channel."""
        old: Any = self.module.weight
        return {self.weight: (old.detach().float() + self.gain * change).to(old.dtype)}

    def written(self, y: Tensor, new: dict[str, Tensor]) -> Tensor:
        """By how much the output y changes with a new weight, rounding to its dtype included."""
        old: Any = self.module.weight
        step = new[self.weight].float() - old.detach().float()
        # without a gain nothing comes out, and nothing changes
        return y.float() * torch.where(self.gain == 0, 0, step / self.gain)


def norm_behind(model: nn.Module, sublayer: Sublayer) -> Norm | None:
    """The norm through which a sublayer writes, if it has one that a weight says all of."""
    if sublayer.output not in sublayer.norms:
        return None
    module = model.get_submodule(sublayer.output)
    known = [name for name, _ in module.named_parameters()] == ["weight"]
    gain = gain_of(module) if known else None
    return None if gain is None else Norm(f"{sublayer.output}.weight", module, gain)
