"""How much each weight matters, seen through low-rank adapters that are trained meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy.low_rank import is_conv, matrix
from billhook.anatomy.types import Anatomy, Inner
from billhook.data import Windows
from billhook.measure.patch import Forward, hooked, observing
from billhook.plan.address import Address
from billhook.plan.errors import InputError

Progress = Callable[[str, int, int], None]
RANK, RATE, MEMORY = 8, 1e-3, 0.9


@dataclass(frozen=True)
class _Adapter:
    """Beside a linear x W' (or x W, ``transposed``) the product x A' B', A [rank, inputs], B [outputs, rank], which
    begins at 0."""

    weight: Tensor
    transposed: bool
    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, linear: Any, generator: torch.Generator) -> _Adapter:
        weight: Tensor = linear.weight.detach()
        outputs, inputs = matrix(linear).shape
        a = torch.randn(RANK, inputs, generator=generator).to(weight.device) / inputs**0.5
        return cls(
            weight, is_conv(linear), a.requires_grad_(), torch.zeros(outputs, RANK, device=a.device).requires_grad_()
        )

    def hook(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        x: Tensor = args[0]
        return output + ((x.float() @ self.a.T) @ self.b.T).to(output.dtype)

    def importance(self, of_a: Tensor, of_b: Tensor) -> Tensor:
        """((dL/dW) W)^2 in the shape of the weight, with dL/dW guessed from the slopes of the factors."""
        with torch.no_grad():
            slope = of_b @ self.a + self.b @ of_a - of_b @ of_a
            whole = self.b @ self.a + (self.weight.T if self.transposed else self.weight).float()
            figure = (slope * whole).square()
            return figure.T if self.transposed else figure


def lora_slopes(
    model: nn.Module,
    anatomy: Anatomy,
    units: Mapping[Address, Inner],
    windows: Windows,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """For the matrices through which inner units read and write, by name: the importance of each weight, float32 in the
    shape of the weight, as a moving average over the windows.

    Every matrix W gets an adapter B A of rank 8, trained on the next-token loss by Adam, a step a window; W is fixed
    and gets no gradient. That of W is guessed as (dL/dB) A + B (dL/dA) - (dL/dB) (dL/dA), and a weight's importance is
    (its slope times the merged weight W + B A)^2. Source: LoRAPrune (arXiv 2305.18403); there pruning and training
    take turns, here the importance is taken once. The adapters are thrown away.

    Cost: about three forward passes; memory: one float32 matrix for each weight, and the activations of one window.
    Raises InputError for a model that gives no next-token logits, and where the loss is not finite.
    """
    if anatomy.head is None:
        raise InputError(f"slopes of adapters need a language model; this {anatomy.family} model has no head")
    generator = torch.Generator().manual_seed(seed)
    adapters = {name: _Adapter.of(linear, generator) for name, linear in _linears(model, units.values())}
    learned = [factor for adapter in adapters.values() for factor in (adapter.a, adapter.b)]
    adam = torch.optim.Adam(learned, lr=RATE)
    found: dict[str, Tensor] = {}
    hooks: list[tuple[nn.Module, Forward]] = [
        (model.get_submodule(name.removesuffix(".weight")), adapter.hook) for name, adapter in adapters.items()
    ]
    for number, ids in enumerate(windows.ids.to(next(model.parameters()).device)):
        with observing(model), hooked(hooks), torch.enable_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            loss = nn.functional.cross_entropy(logits.float(), ids[1:])
            slopes = torch.autograd.grad(loss, learned)
        if not loss.isfinite():
            raise InputError("the loss is not finite: the weights or the calibration are damaged")
        for (name, adapter), of_a, of_b in zip(adapters.items(), slopes[::2], slopes[1::2], strict=True):
            now = adapter.importance(of_a, of_b)
            found[name] = now if name not in found else MEMORY * found[name] + (1 - MEMORY) * now
        for factor, slope in zip(learned, slopes, strict=True):
            factor.grad = slope
        adam.step()
        if progress is not None:
            progress("adapters", number + 1, len(windows.ids))
    return found


def _linears(model: nn.Module, units: Iterable[Inner]) -> list[tuple[str, nn.Module]]:
    """The matrices that units own a part of."""
    names = dict.fromkeys(s.parameter for inner in units for s in inner.slices if s.parameter.endswith(".weight"))
    return [(n, model.get_submodule(n.removesuffix(".weight"))) for n in names if model.get_parameter(n).ndim == 2]
