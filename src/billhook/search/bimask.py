"""Importance and width of every sublayer learned at once, by a mask that goes over from the one to the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy import Inner
from billhook.measure.patch import hooked_before, observing
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.search.width import Space, WidthProblem, order_of

Progress = Callable[[str, int, int], None]
LEVELS = 16  # widths to choose from in each sublayer
RATE = 0.1
BUDGET = 20.0  # weight of what is over the budget, relative to dense
ONE_HOT = 0.2  # weight of the entropy of the choice of a width, in the end


@dataclass(frozen=True, eq=False)
class _Mask:
    """Of one sublayer: ``importance`` [units] and ``choice`` [levels] are learned; ``widths`` [levels] are those to
    choose from, as numbers of units."""

    space: Space
    importance: Tensor
    choice: Tensor
    widths: Tensor

    @classmethod
    def of(cls, space: Space, device: torch.device) -> _Mask:
        levels = min(LEVELS, len(space.left))
        places = [round(i * (len(space.left) - 1) / max(levels - 1, 1)) for i in range(levels)]
        widths = torch.tensor([float(space.left[place]) for place in places], device=device)
        start = torch.linspace(1.0, 0.0, levels, device=device)
        importance = torch.full((space.count,), 2.0, device=device)
        return cls(space, importance.requires_grad_(), start.requires_grad_(), widths)

    def sparsity(self) -> Tensor:
        """Of each unit, how likely the width is to reach its place: sum over widths w of p_w [place < w]."""
        order = order_of(self.importance.detach().cpu(), self.space.parts).flip(0)
        places = torch.empty(self.space.count, device=self.widths.device)
        places[order] = torch.arange(self.space.count, dtype=places.dtype, device=places.device)
        reach: Tensor = (places[:, None] < self.widths).float() @ self.choice.softmax(0)
        return reach

    def mixed(self, share: float) -> Tensor:
        return share * self.importance.sigmoid() + (1 - share) * self.sparsity()

    def undecided(self) -> Tensor:
        """The entropy of the choice of a width, 1 at most."""
        p = self.choice.softmax(0)
        return -(p * p.clamp(min=1e-12).log()).sum() / max(torch.tensor(float(len(p))).log().item(), 1e-12)


def bimask(
    model: nn.Module,
    problem: WidthProblem,
    units: Mapping[Address, Inner],
    batches: Sequence[Mapping[str, Any]],
    *,
    steps: int,
    progress: Progress | None = None,
) -> tuple[dict[Address, Tensor], int]:
    """A figure for every inner unit, high is important: how likely it is to be within the learned width of its
    sublayer, and by its learned importance where these are equal; and the number of passes over a batch.

    Every unit is multiplied with share x sigmoid(importance) + (1 - share) x (the probability that the width reaches
    its place, the places being those by importance). The share falls from 1 to 0 over the steps, so that importance is
    learned first and the width in the end alone. What is minimised by Adam, the weights fixed, is the divergence of the
    output from the dense model's, what is over the budget, and the entropy of the choice of each width, which weighs
    more as the share falls (the adaptive one-hot loss: in the end one width is chosen).

    Source: Once for Both (arXiv 2403.15835): the bi-mask, and a loss that turns a soft choice into a hard one at the
    pace of the search. Left out: the weights are not trained along, and so there is no masked image modelling. Cost: a
    pass and a backward pass over one batch a step, and a pass of the dense model: about four passes. Raises InputError
    where a loss is not finite.
    """
    device = next(model.parameters()).device
    masks = [_Mask.of(space, device) for space in problem.spaces]
    learned = [tensor for mask in masks for tensor in (mask.importance, mask.choice)]
    adam = torch.optim.Adam(learned, lr=RATE)
    for step in range(steps):
        share, batch = 1 - step / max(steps - 1, 1), step % len(batches)
        values = [mask.mixed(share) for mask in masks]
        with observing(model):
            log_p = _predicted(model, batches[batch])
        with observing(model), torch.enable_grad(), _masking(model, masks, values, units):
            log_q = _predicted(model, batches[batch])
            loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
            loss = loss + BUDGET * _over(problem, masks, values)
            loss = loss + ONE_HOT * (1 - share) * torch.stack([mask.undecided() for mask in masks]).mean()
        if not loss.isfinite():
            raise InputError("the loss is not finite: the weights or the calibration are damaged")
        for tensor, slope in zip(learned, torch.autograd.grad(loss, learned, allow_unused=True), strict=True):
            tensor.grad = slope
        adam.step()
        if progress is not None:
            progress("bi-mask", step + 1, steps)
    figures = {m.space.address: (m.sparsity() + 1e-3 * m.importance.sigmoid()).detach().double().cpu() for m in masks}
    return figures, 4 * steps


def _over(problem: WidthProblem, masks: list[_Mask], values: list[Tensor]) -> Tensor:
    """By how much the masked model is over its limits, each relative to dense."""
    total = torch.zeros((), device=values[0].device)
    for kind, ceiling in problem.ceilings.items():
        saved = sum((m.space.saving[kind] * (1 - v).sum() for m, v in zip(masks, values, strict=True)), total * 0)
        total = total + ((problem.dense[kind] - saved - ceiling) / problem.dense[kind]).clamp(min=0)
    return total


@contextmanager
def _masking(
    model: nn.Module, masks: list[_Mask], values: list[Tensor], units: Mapping[Address, Inner]
) -> Iterator[None]:
    """What the units hand to the linears that write is multiplied with their masks."""
    hooks = []
    for mask, value in zip(masks, values, strict=True):
        for piece in (s for s in units[mask.space.address].slices if s.writes):
            linear = model.get_submodule(piece.parameter.removesuffix(".weight"))

            def scaled(module: nn.Module, args: Any, value: Tensor = value, width: int = piece.width) -> Any:
                return (args[0] * value.repeat_interleave(width).to(args[0].dtype), *args[1:])

            hooks.append((linear, scaled))
    with hooked_before(hooks):
        yield


def _predicted(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return torch.log_softmax(model(**batch).logits.float(), -1)
