"""Cutting inner units of a live model in place: neurons, KV groups, experts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy import Anatomy, Inner, Stack
from billhook.anatomy.config import owners, resolve
from billhook.anatomy.vocabulary import EXPERTS
from billhook.plan.address import Address
from billhook.plan.plan import Keep
from billhook.plan.widths import common_sizes, counts

Setter = Callable[[Any, str, Any], None]


def narrow(model: nn.Module, anatomy: Anatomy, keeps: Iterable[Keep], put: Setter) -> None:
    """Leave only the kept units of every tensor that has any, and tell the modules that keep count.

    Copies the slices that stay, a tensor at a time; the tensors that were there are not touched. ``put(owner, name,
    value)`` sets an attribute. Block numbers are those of the model as it is.
    """
    for keep in keeps:
        inner = inner_of(anatomy, keep)
        for name, (axis, left) in kept_entries(inner, keep.indices).items():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            old = getattr(module, leaf)
            new: Tensor = old.detach().index_select(axis, torch.tensor(left, device=old.device))
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            put(module, leaf, new)
        resize(model, inner.attributes, len(keep.indices), put)


def resize(model: nn.Module, attributes: Any, units: int, put: Any) -> None:
    """Tell modules how many units they have: (path, attribute, amount a unit); ``config.NAME`` in a config of its own,
    where the one that it shares says something else."""
    for path, name, amount in attributes:
        module: Any = model.get_submodule(path)
        owner, _, key = name.rpartition(".")
        if not owner:
            put(module, key, amount * units)
        elif getattr(module.config, key) != amount * units:
            own = copy.copy(module.config)
            own.__dict__.pop("_heterogeneity_spec", None)
            setattr(own, key, amount * units)
            put(module, "config", own)


def state(model: nn.Module, anatomy: Anatomy, keeps: tuple[Keep, ...], drops: frozenset[Address], put: Setter) -> None:
    """Put the new sizes into the config, as far as its plain values can say them: where all blocks that are left agree.

    Sizes that differed before the cut, and no longer do, are stated too.
    """
    before, after = (common_sizes(o, drops) for o in (anatomy.outline, anatomy.outline.narrowed(counts(keeps))))
    uneven = {key for key, size in common_sizes(anatomy.outline, ()).items() if size is None}
    for stack in anatomy.stacks:
        owner = stack.counters[0].owner
        left = {keep.unit: len(keep.indices) for keep in keeps}
        told: set[str] = set()
        for address, units in anatomy.inner.items():
            for inner in units:
                key = f"{owner}.{inner.keys[0][0]}" if inner.keys and address.stack == stack.name else ""
                size = after.get(key)
                if key in told or size is None or (size == before[key] and key not in uneven):
                    continue
                if address in drops or address.parent in drops:
                    continue
                told.add(key)
                count = left.get(address, inner.count)
                values = {name: amount * count for name, amount in inner.keys} | dict(inner.states)
                for path in owners(stack):
                    for name, value in values.items():
                        put(resolve(model, path), name, value)
                for name in EXPERTS:  # the model's own count, for its balancing loss
                    if inner.kind == "expert" and vars(model).get(name) == inner.count:
                        put(model, name, count)
        if any(keep.inner == "expert" and keep.unit.stack == stack.name for keep in keeps):
            _unbalanced(model, anatomy, stack, after, put)


def _unbalanced(model: nn.Module, anatomy: Anatomy, stack: Stack, after: dict[str, int | None], put: Setter) -> None:
    """A balancing loss over all blocks at once takes equally many experts in each: where they differ none is made."""
    owner = stack.counters[0].owner
    keys = {
        f"{owner}.{u.keys[0][0]}" for units in anatomy.inner.values() for u in units if u.kind == "expert" and u.keys
    }
    for path in owners(stack) if any(after.get(key) is None for key in keys) else ():
        if getattr(resolve(model, path), "output_router_logits", False):
            put(resolve(model, path), "output_router_logits", False)


def inner_of(anatomy: Anatomy, keep: Keep) -> Inner:
    return next(inner for inner in anatomy.inner[keep.unit] if inner.kind == keep.inner)


def kept_entries(inner: Inner, indices: Iterable[int]) -> dict[str, tuple[int, list[int]]]:
    """For every tensor that holds units: the axis along which it is cut, and which entries stay, in order."""
    indices = tuple(indices)
    found: dict[str, tuple[int, list[int]]] = {}
    for piece in sorted(inner.slices, key=lambda s: s.start):
        entries = (piece.start + u * piece.width + i for u in indices for i in range(piece.width))
        found.setdefault(piece.parameter, (piece.axis, []))[1].extend(entries)
    return found
