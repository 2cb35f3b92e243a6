"""Small trained weights that stand in for a later recovery while it is being learned what may go.

They are thrown away afterwards: what counts is which units a model can spare once it may adapt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from billhook.anatomy.types import Anatomy
from billhook.measure.patch import Forward, stream_in
from billhook.plan.address import Address


class StandIn(Protocol):
    """``weights`` come into being with the first pass, in float32, and start as no change to the model."""

    @property
    def weights(self) -> list[Tensor]: ...

    def hooks(
        self, model: nn.Module, anatomy: Anatomy, units: Mapping[Address, Tensor]
    ) -> list[tuple[nn.Module, Forward]]:
        """What is hooked on, before the gates are."""

    def instead(self, unit: Address, gate: Tensor, stream: Tensor) -> Tensor | float:
        """What is added to what a unit hands on."""


class Nothing:
    """No stand-in: the model as it is."""

    weights: list[Tensor] = []  # noqa: RUF012 (never added to)

    def hooks(self, *_: Any) -> list[tuple[nn.Module, Forward]]:
        return []

    def instead(self, *_: Any) -> float:
        return 0.0


class _Pairs:
    """Pairs of matrices [inputs, rank] and [rank, outputs] by name, the second one zero at first."""

    def __init__(self, rank: int, seed: int) -> None:
        self._rank, self._seed = rank, seed
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def weights(self) -> list[Tensor]:
        return [weight for pair in self._pairs.values() for weight in pair]

    def _apply(self, name: str, x: Tensor, outputs: int, bend: Callable[[Tensor], Tensor]) -> Tensor:
        """bend(x down) up, in float32 and back."""
        if name not in self._pairs:
            draw = torch.Generator().manual_seed(self._seed + len(self._pairs))
            down = torch.randn(x.shape[-1], self._rank, generator=draw) / x.shape[-1] ** 0.5
            up = torch.zeros(self._rank, outputs)
            self._pairs[name] = down.to(x.device).requires_grad_(), up.to(x.device).requires_grad_()
        down, up = self._pairs[name]
        return (bend(x.float() @ down) @ up).to(x.dtype)


class LowRank(_Pairs):
    """W + U V of a small rank for the write linears of all units (LoRA, Hu et al. 2021, equation 3, with a scale of 1):
    what TinyFusion trains along with its masks. Weights that belong to no linear (fused experts) are left alone."""

    def __init__(self, rank: int = 8, seed: int = 0) -> None:
        super().__init__(rank, seed)

    def hooks(
        self, model: nn.Module, anatomy: Anatomy, units: Mapping[Address, Tensor]
    ) -> list[tuple[nn.Module, Forward]]:
        inside = {unit.parent if unit.sublayer else unit for unit in units}
        sublayers = [s for block in sorted(inside) for s in anatomy.block(block).sublayers]
        names = [name for s in sublayers for name in s.writes if name.endswith(".weight")]
        return [(model.get_submodule(n.removesuffix(".weight")), self._updated(n)) for n in names]

    def instead(self, unit: Address, gate: Tensor, stream: Tensor) -> float:
        return 0.0

    def _updated(self, name: str) -> Forward:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            return output + self._apply(name, args[0], output.shape[-1], lambda x: x)

        return hook


class Adapters(_Pairs):
    """A bottleneck in the place of each unit, as far as it is shut: (1 - gate) up(gelu(down(x))) for what the unit
    reads, x, scaled to unit root mean square."""

    def __init__(self, rank: int = 8, seed: int = 0) -> None:
        super().__init__(rank, seed)
        self._read: dict[Address, Tensor] = {}

    def hooks(
        self, model: nn.Module, anatomy: Anatomy, units: Mapping[Address, Tensor]
    ) -> list[tuple[nn.Module, Forward]]:
        paths = {u: anatomy.sublayer(u).module if u.sublayer else anatomy.block(u).path for u in units}
        return [(model.get_submodule(path), self._watching(unit)) for unit, path in paths.items()]

    def instead(self, unit: Address, gate: Tensor, stream: Tensor) -> Tensor:
        x = self._read.pop(unit)
        x = x / (x.float().square().mean(-1, keepdim=True).sqrt().to(x.dtype) + 1e-6)
        return (1 - gate) * self._apply(str(unit), x, stream.shape[-1], nn.functional.gelu)

    def _watching(self, unit: Address) -> Forward:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._read[unit] = stream_in(*args, **kwargs)

        return hook
