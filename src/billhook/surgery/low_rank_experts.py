"""Experts of a live model taken apart, in place: some of their neurons whole, the others of low rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy import Anatomy
from billhook.anatomy.low_rank_experts import LowRankExperts
from billhook.anatomy.mixtures import gated
from billhook.plan.plan import Factorise, Plan

Swap = Callable[[nn.Module, str, nn.Module], None]


def mixtures_of(plan: Any, anatomy: Anatomy) -> tuple[tuple[str, int], ...]:
    """Path in the model and rank of each mixture that a (checked) plan takes apart, in order of address."""
    edits = sorted(plan.factors if isinstance(plan, Plan) else (), key=lambda edit: (edit.unit, edit.linear))
    return tuple((_path(edit, anatomy), edit.rank) for edit in edits if is_mixture(edit, anatomy))


def is_mixture(edit: Factorise, anatomy: Anatomy) -> bool:
    """Whether an edit is of experts, not of a linear."""
    block = anatomy.outline.stack(edit.unit.stack).blocks[edit.unit.block]
    return edit.linear in block.sublayers[str(edit.unit.sublayer)].mixtures


def take_apart(model: nn.Module, mixtures: Iterable[tuple[str, int]], swap: Swap) -> None:
    """Put ``LowRankExperts`` in the place of each. ``swap(model, path, module)`` exchanges.

    The first ``rank`` neurons of an expert stay as they are. For the others, gate and up W [2 (n - r), hidden] in one
    and down W [hidden, n - r] become U U'W, the nearest matrix of that rank (Eckart-Young), U being their first left
    singular vectors. So whoever knows which neurons matter puts these first (see ``heal.combining.condense``), and
    weights that are of that rank already stay what they are. Cost: a singular value decomposition of each, in float32.
    """
    for path, rank in mixtures:
        experts: Any = model.get_submodule(path)
        gate_up, down = (weight.detach() for weight in gated(experts))
        gate, up = gate_up.chunk(2, dim=1)
        weights = {"reads": torch.cat([gate[:, :rank], up[:, :rank]], 1), "writes": down[:, :, :rank].contiguous()}
        others = {"reads": torch.cat([gate[:, rank:], up[:, rank:]], 1), "writes": down[:, :, rank:]}
        for name, weight in others.items():
            weights[f"{name}_reduce"], weights[f"{name}_expand"] = _parts(weight, rank)
        with torch.device("meta"):
            two = LowRankExperts(len(down), down.shape[1], down.shape[2], rank, experts.act_fn)
        asks = gated(experts)[1].requires_grad
        for name, weight in weights.items():
            two.register_parameter(name, nn.Parameter(weight, requires_grad=asks))
        swap(model, path, two.train(experts.training))


def empty_experts(model: nn.Module, mixtures: Iterable[tuple[str, int]]) -> None:
    """Put ``LowRankExperts`` in the place of those at the given paths, for a file to fill."""
    for path, rank in mixtures:
        experts: Any = model.get_submodule(path)
        _, down = gated(experts)
        with down.device:
            two = LowRankExperts(len(down), down.shape[1], down.shape[2], rank, experts.act_fn).to(down.dtype)
        model.set_submodule(path, two)


def _parts(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U'W [experts, rank, i] and U [experts, o, rank] of the first left singular vectors of each W [experts, o, i]."""
    basis = torch.linalg.svd(weight.float(), full_matrices=False).U[:, :, :rank]
    return (basis.mT @ weight.float()).to(weight.dtype), basis.contiguous().to(weight.dtype)


def _path(edit: Factorise, anatomy: Anatomy) -> str:
    return f"{anatomy.block(edit.unit.parent).path}.{edit.linear}"
