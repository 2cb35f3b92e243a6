"""Single weights set to zero: the masks of a plan put on a live model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from billhook.anatomy import Anatomy
from billhook.anatomy.linears import Linear, linears
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.masks import Packed, parse_pattern, unpack
from billhook.plan.plan import Keep, Plan, Sparsify
from billhook.surgery.narrow import inner_of, kept_entries

Setter = Callable[[Any, str, Any], None]
Masks = Mapping[str, Packed]
"""Name of a parameter in the original model -> its packed mask."""


def masks_of(plan: Plan | Iterable[Address], anatomy: Anatomy, model: nn.Module) -> dict[str, Packed]:
    """The masks of a (checked) plan. InputError for one that does not fit its weight, or breaks its own pattern."""
    found: dict[str, Packed] = {}
    if not isinstance(plan, Plan):
        return found
    for edit in plan.sparsities:
        known = {linear.inside: linear for linear in _linears(model, anatomy, edit.unit)}
        for inside in edit.zeros:
            if inside not in known:
                raise InputError(f"{edit.unit} has no linear {inside}; it has {', '.join(known)}")
            packed = plan.arrays[edit.array(inside)]
            _check(edit, known[inside], packed, tuple(model.get_parameter(known[inside].name).shape))
            found[known[inside].name] = packed
    return found


def put_masks(model: nn.Module, masks: Masks, put: Setter) -> None:
    """Give each masked weight a copy with zeros, a tensor at a time; those that were there are not touched. The names
    are those of the model as it is."""
    for name, packed in masks.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        old = module.get_parameter(leaf)
        put(module, leaf, nn.Parameter(masked(old.detach(), packed), requires_grad=old.requires_grad))


def masked(weight: Tensor, packed: Packed) -> Tensor:
    """A copy of a weight with zeros where the mask says so."""
    kept = torch.from_numpy(unpack(packed, tuple(weight.shape))).to(weight.device)
    return torch.where(kept, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def zeros_left(plan: Plan, anatomy: Anatomy, model: nn.Module, keeps: Iterable[Keep]) -> dict[Address, int]:
    """How many weights the masks of a (checked) plan set to zero in each sublayer, of those that ``keeps`` leave.
    ``model`` is the original one."""
    kept = {unit: kept_entries(inner_of(anatomy, keep), keep.indices) for keep in keeps for unit in [keep.unit]}
    found = {}
    for edit in plan.sparsities:
        names = {linear.inside: linear.name for linear in _linears(model, anatomy, edit.unit)}
        total = 0
        for inside, zeros in edit.zeros.items():
            name = names[inside]
            if name in kept.get(edit.unit, {}):
                axis, entries = kept[edit.unit][name]
                mask = unpack(plan.arrays[edit.array(inside)], tuple(model.get_parameter(name).shape))
                zeros = int(np.count_nonzero(~mask.take(entries, axis=axis)))
            total += zeros
        found[edit.unit] = total
    return found


def _linears(model: nn.Module, anatomy: Anatomy, unit: Address) -> tuple[Linear, ...]:
    return linears(model, anatomy.sublayer(unit), anatomy.block(unit.parent).path)


def _check(edit: Sparsify, linear: Linear, packed: Packed, shape: tuple[int, ...]) -> None:
    try:
        mask = unpack(packed, shape)
    except InputError as error:
        raise InputError(f"{edit.array(linear.inside)}: {error}") from error
    zeros = mask.size - int(np.count_nonzero(mask))
    if zeros != edit.zeros[linear.inside]:
        raise InputError(
            f"{edit.array(linear.inside)} has {zeros} zeros, where the plan says {edit.zeros[linear.inside]}"
        )
    pattern = parse_pattern(edit.pattern)
    if pattern is not None:
        n, m = pattern
        rows = np.moveaxis(mask, linear.axis, -1)
        if rows.shape[-1] % m or (rows.reshape(-1, m).sum(axis=1) > n).any():
            raise InputError(f"{edit.array(linear.inside)} does not keep to the pattern {edit.pattern} that it states")
