"""Linears in two parts, as one matrix: for refits that keep to what the second part can put out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from billhook.anatomy import Anatomy
from billhook.anatomy.low_rank import as_kept, matrix
from billhook.plan.errors import InputError
from billhook.surgery.factorise import Factor, parts
from billhook.surgery.low_rank_experts import mixtures_of


def require_linears(plan: object, anatomy: Anatomy) -> None:
    """InputError for a plan that takes experts apart: merging alone gives these new weights."""
    if mixtures_of(plan, anatomy):
        raise InputError("experts in two parts cannot be healed; their weights come from the merging")


def projected(model: nn.Module, factors: Iterable[Factor]) -> dict[str, Tensor]:
    """U U'W for each linear W that becomes two, by the name and in the form of its weight."""
    found = {}
    for factor in factors:
        linear: Any = model.get_submodule(factor.path)
        reduce, expand = parts(matrix(linear), factor.basis)
        product = (expand.float() @ reduce.float()).to(reduce.dtype)
        found[f"{factor.path}.weight"] = as_kept(linear, product)
    return found


def onto(basis: Tensor, scale: Tensor, cross: Tensor) -> Tensor:
    """Columns of ``cross`` [inputs, outputs] as far as a linear reaches them that puts out U z times a ``scale`` for
    each output: cross / scale U U' scale."""
    u = basis.to(cross.device)
    return cross / scale @ u @ u.T * scale


def rejoined(model: nn.Module, factors: Iterable[Factor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` of a cut model, by the names of the original, with U V for each new first part V: the weight of which
    a cut makes V again. InputError for a second part that is not the one of the plan."""
    found = dict(tensors)
    for factor in factors:
        reduce = found.pop(f"{factor.path}.reduce.weight", None)
        if f"{factor.path}.expand.weight" in found:
            raise InputError(f"{factor.path} has another second part than its plan says")
        if reduce is not None:
            linear: Any = model.get_submodule(factor.path)
            product = (factor.basis.to(reduce.device) @ reduce.float()).to(reduce.dtype)
            found[f"{factor.path}.weight"] = as_kept(linear, product)
        bias = found.pop(f"{factor.path}.expand.bias", None)
        if bias is not None:
            found[f"{factor.path}.bias"] = bias
    return found
