"""The order of the ranks of linears learned: factors trained with their ends dropped at random."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as applied

from billhook.anatomy.low_rank import matrix
from billhook.anatomy.types import Anatomy
from billhook.measure.patch import observing, overridden
from billhook.measure.spectrum import Spectrum
from billhook.plan.errors import InputError
from billhook.search.bases import Linear

Progress = Callable[[str, int, int], None]
RATE = 3e-4  # of Adam, falling to zero


@dataclass(eq=False)
class Factors:
    """A linear as ``expand`` [outputs, useful] of ``reduce`` [useful, inputs], float32, learned so that the first ranks
    of both matter most. ``energies`` [useful]: mean square of what each rank puts out, float64."""

    expand: Tensor
    reduce: Tensor
    energies: Tensor

    def basis(self, rank: int) -> Tensor:
        """Orthonormal [outputs, rank]: what the first ranks can put out."""
        basis: Tensor = torch.linalg.qr(self.expand[:, :rank])[0]
        return basis

    def weight(self, rank: int) -> Tensor:
        """What the first ranks compute, as one matrix [outputs, inputs]."""
        return self.expand[:, :rank] @ self.reduce[:rank]


class _Nested:
    """The stand-in for one linear, ``rank`` wide at the moment, with sums over the tokens that each rank has seen."""

    def __init__(self, module: Any, start: Spectrum, least: int) -> None:
        self.module, self.least, self.rank = module, least, len(start.energies)
        weight = matrix(module)
        basis = start.basis.to(weight.device)
        self.expand = basis.clone().requires_grad_()
        self.reduce = (basis.T @ weight.float()).requires_grad_()
        self.sums = torch.zeros(self.rank, dtype=torch.float64, device=weight.device)
        self.tokens = torch.zeros_like(self.sums)

    def __call__(self, x: Tensor) -> Tensor:
        between = applied(x, self.reduce[: self.rank].to(x.dtype))
        seen = between.detach().double().square().flatten(0, -2)
        self.sums[: self.rank] += seen.sum(0)
        self.tokens[: self.rank] += len(seen)
        return applied(between, self.expand[:, : self.rank].to(x.dtype), self.module.bias)

    def factors(self, start: Spectrum, tokens: int) -> Factors:
        expand, reduce = self.expand.detach().cpu(), self.reduce.detach().cpu()
        seen = (self.sums / self.tokens.clamp(min=1)).cpu() * expand.double().square().sum(0)
        energies = torch.where(self.tokens.cpu() > 0, seen, start.energies.double() / tokens)
        return Factors(expand, reduce, energies)


def nested(
    model: nn.Module,
    anatomy: Anatomy,
    starts: Mapping[Linear, Spectrum],
    ranks: Mapping[Linear, int],
    batches: Sequence[Mapping[str, Any]],
    *,
    steps: int,
    seed: int,
    progress: Progress | None = None,
) -> dict[Linear, Factors]:
    """Factors of the linears in ``ranks``, trained for so many ``steps`` with their ends dropped at random.

    Every linear begins as U of U'W with the basis U of its spectrum, whose energies are sums over the tokens of all
    ``batches``. In each step it is cut off behind a rank drawn for itself, from half of that in ``ranks`` to its last,
    so that the earlier a rank is the more often it counts; Adam lowers the divergence of the output from the dense
    model's. All other weights stay as they are. Then the ends may go.

    Source: Maestro (arXiv 2308.14929): trainable factors that begin at a singular value decomposition, ordered dropout
    over their index with the full model as teacher, importance by what the factors hold. As in the authors' code
    (SamuelHorvath/Maestro-LoD, read and not run) but for these: there linears lose ranks one at a time and from the
    first on, a group lasso shrinks the last ones, and the model is trained along from scratch. Cost: a pass and a
    backward pass over one batch a step, and one of the dense model: about four passes. Memory: the factors four times
    in float32. Raises InputError where a loss is not finite.
    """
    draw = torch.Generator().manual_seed(seed)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    stand_ins = {
        linear: _Nested(_module(model, anatomy, linear), starts[linear], max(rank // 2, 1))
        for linear, rank in sorted(ranks.items())
    }
    learned = [factor for each in stand_ins.values() for factor in (each.expand, each.reduce)]
    adam = torch.optim.Adam(learned, lr=RATE)
    for step in range(steps):
        batch = batches[step % len(batches)]
        with observing(model):
            log_p = _predicted(model, batch)
        for each in stand_ins.values():
            each.rank = int(torch.randint(each.least, len(each.sums) + 1, (), generator=draw))
        forwards = [(each.module, each) for each in stand_ins.values()]
        with observing(model), torch.enable_grad(), overridden(forwards):
            log_q = _predicted(model, batch)
            loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        if not loss.isfinite():
            raise InputError("the loss is not finite: the weights or the calibration are damaged")
        for tensor, slope in zip(learned, torch.autograd.grad(loss, learned), strict=True):
            tensor.grad = slope
        adam.param_groups[0]["lr"] = RATE * (1 - step / steps)
        adam.step()
        if progress is not None:
            progress("nested ranks", step + 1, steps)
    return {linear: each.factors(starts[linear], tokens) for linear, each in stand_ins.items()}


def _module(model: nn.Module, anatomy: Anatomy, linear: Linear) -> nn.Module:
    return model.get_submodule(f"{anatomy.block(linear[0].parent).path}.{linear[1]}")


def _predicted(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return torch.log_softmax(model(**batch).logits.float(), -1)
