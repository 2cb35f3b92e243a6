"""Linears of a live model taken apart, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy import Anatomy
from billhook.anatomy.low_rank import LowRank, matrix
from billhook.plan.errors import InputError
from billhook.plan.plan import Factorise, Plan
from billhook.surgery.low_rank_experts import is_mixture

Swap = Callable[[nn.Module, str, nn.Module], None]


@dataclass(frozen=True, eq=False)
class Factor:
    """An edit with its basis: ``path`` of the linear in the model, ``basis`` [outputs, rank], float32."""

    edit: Factorise
    path: str
    basis: Tensor


def factors_of(plan: Any, anatomy: Anatomy) -> tuple[Factor, ...]:
    """The linears that a (checked) plan takes apart, in order of address. InputError where it lacks a basis, or has one
    of another shape or that is not finite."""
    found = []
    for edit in plan.factors if isinstance(plan, Plan) else ():
        if is_mixture(edit, anatomy):
            continue
        path = f"{anatomy.block(edit.unit.parent).path}.{edit.linear}"
        basis = torch.tensor(plan.arrays[edit.array])
        (stack,) = (s for s in anatomy.outline.stacks if s.name == edit.unit.stack)
        outline = stack.blocks[edit.unit.block].sublayers[str(edit.unit.sublayer)].linears[edit.linear]
        if tuple(basis.shape) != (outline.outputs, edit.rank) or not basis.isfinite().all():
            raise InputError(
                f"the basis of {edit.linear} of {edit.unit} is not {outline.outputs} x {edit.rank} finite numbers"
            )
        found.append(Factor(edit, path, basis.float()))
    return tuple(sorted(found, key=lambda factor: (factor.edit.unit, factor.edit.linear)))


def factorise(model: nn.Module, factors: Iterable[Factor], swap: Swap) -> None:
    """Put two linears in the place of each, with the bias of the old one. ``swap(model, path, module)`` exchanges."""
    for factor in factors:
        linear: Any = model.get_submodule(factor.path)
        weight = matrix(linear)
        with torch.device("meta"):
            two = LowRank(weight.shape[1], factor.edit.rank, weight.shape[0], linear.bias is not None)
        reduce, expand = parts(weight, factor.basis)
        asks = linear.weight.requires_grad
        two.reduce.weight = nn.Parameter(reduce, requires_grad=asks)
        two.expand.weight = nn.Parameter(expand, requires_grad=asks)
        if linear.bias is not None:
            two.expand.bias = linear.bias
        swap(model, factor.path, two.train(linear.training))


def parts(weight: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The two weights U'W [rank, inputs] and U [outputs, rank] for W [outputs, inputs] and an orthonormal basis U of
    what its outputs keep: together U U'W, the projection of all that W puts out. Computed in float32."""
    basis = basis.to(weight.device)
    return (basis.T @ weight.float()).to(weight.dtype), basis.to(weight.dtype)


def empty(model: nn.Module, ranks: Iterable[tuple[str, int]]) -> None:
    """Put two linears of these ranks in the place of those at the given paths, for a file to fill."""
    for path, rank in ranks:
        linear: Any = model.get_submodule(path)
        outputs, inputs = matrix(linear).shape
        with linear.weight.device:
            two = LowRank(inputs, rank, outputs, linear.bias is not None).to(linear.weight.dtype)
        model.set_submodule(path, two)
