"""Single weights that go, block after block: each sees what the sparse blocks before it give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from billhook.anatomy.linears import Linear, linears
from billhook.anatomy.types import Anatomy, Block
from billhook.anatomy.undo import Undo
from billhook.data import Windows
from billhook.heal.healing import Healing, put
from billhook.heal.refit.moments import moments
from billhook.heal.refit.places import at_once
from billhook.heal.refit.stepping import Stepper
from billhook.measure.batches import batches_of
from billhook.measure.cost import CostModel, Costs
from billhook.plan.address import Address
from billhook.plan.arrays import Arrays
from billhook.plan.budget import Budget
from billhook.plan.errors import InputError
from billhook.plan.masks import pack
from billhook.plan.outline import Outline
from billhook.plan.plan import Sparsify
from billhook.search.masks import Pattern, chosen
from billhook.search.second_order import second_order

Progress = Callable[[str, int, int], None]
By = Literal["magnitude", "wanda", "second-order"]


@dataclass(frozen=True)
class WeightProblem:
    """Made by ``pose_weights``: which ``share`` of the weights in the linears of a stack has to go."""

    outline: Outline
    budget: Budget
    dense: Costs
    stack: str
    share: float


@dataclass(frozen=True)
class Sparse:
    """What goes, and ``healing``, the new weights of what stays, where the choice makes some. ``saliency``: the mean of
    the weights of a sublayer. ``work`` counts block-token forwards."""

    edits: tuple[Sparsify, ...]
    arrays: Arrays
    saliency: dict[Address, float]
    work: int
    healing: Healing | None = None


def pose_weights(outline: Outline, budget: Budget, stack: str = "decoder") -> WeightProblem:
    """The task of setting so many weights to zero that the others, with all that is no linear (norms, biases, routers),
    are within ``budget``. InputError for a budget of anything but parameters, and one that cannot be met."""
    dense = CostModel(outline).dense
    if budget.until_cliff or {limit.kind for limit in budget.limits} != {"params"}:
        raise InputError(f"budget {budget}: zeros among the weights save parameters alone; give params=0.5 or the like")
    linear = sum(s.linear_params for a, s in outline.sublayers() if a.stack == stack)
    share = (dense["params"] - budget.ceilings(dense)["params"]) / max(linear, 1)
    if share >= 1:
        raise InputError(
            f"budget {budget} cannot be met: the linears of {stack} hold {linear / dense['params']:.3f} of params"
        )
    return WeightProblem(outline, budget, dense, stack, share)


def sparsify(
    model: nn.Module,
    anatomy: Anatomy,
    stack: str,
    shares: Mapping[int, float],
    source: Windows,
    *,
    by: By,
    pattern: Pattern = None,
    progress: Progress | None = None,
) -> Sparse:
    """Choose what goes from every linear of a stack; ``shares``: which share of its weights a block loses.

    - ``magnitude``: the smallest |w| of a linear go; no data.
    - ``wanda``: the smallest |w| |x_j| of each output, x_j being the norm of the input over all tokens (Wanda, arXiv
      2306.11695, equation 1 and section 3: compared per output).
    - ``second-order``: see ``second_order``; what stays gets new weights.

    With a pattern N:M all three compare within each M inputs of an output. The last two go block by block as published:
    all linears of a block see what the block is given behind the sparse blocks before it, while it is dense itself;
    then it is run once more, sparse, for the next one. The model is as before afterwards.

    Cost: two passes over the text (none for magnitude). Memory: the model, one stream, the statistics of a block.
    Raises InputError for inputs that M does not divide, and where data is needed for fused experts (what each is given
    is not seen), and a linear that no token reaches.
    """
    require_sparsifiable(model, anatomy, stack, by=by, pattern=pattern)
    blocks = anatomy.stack(stack).blocks
    found = {b.address.block: _linears(model, b) for b in blocks}
    state = _State(model)
    tokens = 0
    try:
        if by == "magnitude":
            for block in blocks:
                state.prune(found[block.address.block], {}, by, shares[block.address.block], pattern)
        else:
            stepper = Stepper(model, anatomy.stack(stack), list(batches_of(source, model)))
            streams = [stepper.enter(i) for i in range(len(stepper.batches))]
            tokens = sum(stream.shape[0] * stream.shape[1] for stream in streams)
            for number, block in enumerate(blocks):
                mine = found[block.address.block]
                names = [linear.name for linears in mine.values() for linear in linears]
                grams = moments(stepper, block, names, streams)
                state.prune(mine, grams, by, shares[block.address.block], pattern)
                if number < len(blocks) - 1:
                    streams = [stepper.run(i, at_once(block), stream, ()) for i, stream in enumerate(streams)]
                if progress is not None:
                    progress("weights", number + 1, len(blocks))
    finally:
        state.undo.restore()
    work = 2 * tokens * len(blocks)
    healing = Healing(state.tensors, (), {}, tokens, 0) if by == "second-order" else None
    return Sparse(edits_of(state.zeros, pattern), Arrays(state.arrays), state.saliency, work, healing)


def require_sparsifiable(model: nn.Module, anatomy: Anatomy, stack: str, *, by: By, pattern: Pattern = None) -> None:
    """InputError where ``sparsify`` would refuse the model, before anything is measured."""
    for linear in (
        linear for b in anatomy.stack(stack).blocks for mine in _linears(model, b).values() for linear in mine
    ):
        weight = model.get_parameter(linear.name)
        inputs = weight.shape[linear.axis]
        if pattern is not None and inputs % pattern[1]:
            raise InputError(
                f"{linear.name} has {inputs} inputs, which pattern {pattern[0]}:{pattern[1]} does not divide"
            )
        if by != "magnitude" and weight.ndim == 3:
            raise InputError(f"{linear.name} are fused experts: what each is given is not seen; use magnitude-sparse")


def edits_of(zeros: Mapping[Address, dict[str, int]], pattern: Pattern) -> tuple[Sparsify, ...]:
    """The edits of sublayers, from how many weights of each linear go."""
    label = "unstructured" if pattern is None else f"{pattern[0]}:{pattern[1]}"
    return tuple(Sparsify(unit=unit, pattern=label, zeros=mine) for unit, mine in sorted(zeros.items()))


def note(
    zeros: dict[Address, dict[str, int]], arrays: dict[str, NDArray[Any]], unit: Address, linear: Linear, kept: Tensor
) -> None:
    """Add the mask of a linear (bool, in the shape of its weight) to what goes, unless it keeps everything."""
    gone = kept.numel() - int(kept.sum())
    if gone:
        zeros.setdefault(unit, {})[linear.inside] = gone
        arrays[f"{unit}/{linear.inside}"] = pack(np.asarray(kept.cpu()))


def _linears(model: nn.Module, block: Block) -> dict[Address, tuple[Linear, ...]]:
    return {sublayer.address: linears(model, sublayer, block.path) for sublayer in block.sublayers}


@dataclass
class _State:
    """What has been chosen; the model holds it until ``undo``."""

    model: nn.Module
    undo: Undo = field(default_factory=Undo)
    zeros: dict[Address, dict[str, int]] = field(default_factory=dict)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    saliency: dict[Address, float] = field(default_factory=dict)

    def prune(
        self,
        found: Mapping[Address, tuple[Linear, ...]],
        grams: Mapping[str, Tensor],
        by: By,
        lost: float,
        pattern: Pattern,
    ) -> None:
        """All linears of a block."""
        for unit, mine in found.items():
            total, count = 0.0, 0
            for linear in mine:
                old = self.model.get_parameter(linear.name).detach()
                rows = linear.rows(old).float()
                saliency = rows.abs()
                if by != "magnitude":
                    saliency = saliency * grams[linear.name].diagonal().sqrt()
                if by == "second-order":
                    mask, new = second_order(rows, grams[linear.name], 1 - lost, pattern)
                    self.tensors[linear.name] = linear.whole(new, old).to(old.dtype)
                else:
                    mask = chosen(saliency, 1 - lost, pattern, by_row=by == "wanda")
                kept = linear.whole(mask, old)
                put(self.model, linear.name, torch.where(kept, self.tensors.get(linear.name, old), 0), self.undo)
                total, count = total + saliency.sum(dtype=torch.float64).item(), count + saliency.numel()
                note(self.zeros, self.arrays, unit, linear, kept)
            self.saliency[unit] = total / max(count, 1)
