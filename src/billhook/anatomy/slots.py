"""Which place in the KV cache each remaining attention gets."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from billhook.anatomy.config import resolve
from billhook.anatomy.types import Stack
from billhook.plan.address import Address

Setter = Callable[[Any, str, Any], None]


def cache_slots(kinds: list[str], attends: list[bool]) -> tuple[list[str], list[int | None]]:
    """New layer types and the cache slot of each block, None where it has no attention.

    transformers makes one cache layer a block, of the block's type (full, sliding window, ...), takes the length of the
    cache from slot 0 and the size of a mask from the first slot of its type. So the attentions that are left fill the
    slots of their own type from the front, and a first block without attention takes the type of the first block that
    has one (its own type no longer matters). Without gaps this is the block's own number.
    """
    kinds = list(kinds)
    if not attends[0] and any(attends):
        kinds[0] = kinds[attends.index(True)]
    free: dict[str, list[int]] = defaultdict(list)
    for slot, kind in enumerate(kinds):
        free[kind].append(slot)
    taken: Counter[str] = Counter()
    slots: list[int | None] = []
    for kind, attention in zip(kinds, attends, strict=True):
        slots.append(free[kind][taken[kind]] if attention else None)
        taken[kind] += attention
    return kinds, slots


def assign_slots(
    model: nn.Module, stack: Stack, drops: frozenset[Address], put: Setter, order: Sequence[int] | None = None
) -> None:
    """Renumber ``layer_idx`` throughout a stack whose list of blocks is already shortened, or holds them in ``order``.

    ``put(owner, name, value)`` sets an attribute. Attentions that cache get their slots, everything else its block's
    number.
    """
    if order is None:
        order = [i for i, block in enumerate(stack.blocks) if block.address not in drops]
    kept = [stack.blocks[i] for i in order]
    config = resolve(model, stack.counters[-1].owner)
    types = getattr(config, "layer_types", None)
    has = {s.address for block in kept for s in block.sublayers} - drops

    caching = ("attention", "cross_attention") if stack.causal else ()
    for kind in caching:
        attends = [Address(b.address.stack, b.address.block, kind) in has for b in kept]
        per_type = list(types) if types is not None and kind == "attention" else ["full_attention"] * len(kept)
        new_types, slots = cache_slots(per_type, attends)
        if types is not None and kind == "attention" and new_types != per_type:
            put(config, "layer_types", type(types)(new_types))
        for index, (block, slot) in enumerate(zip(kept, slots, strict=True)):
            module = model.get_submodule(f"{stack.path}.{index}")
            for sublayer in block.sublayers:
                if sublayer.kind == kind and slot is not None:
                    inside = sublayer.module.removeprefix(f"{block.path}.")
                    _renumber(module.get_submodule(inside), slot, put)
    for index, block in enumerate(kept):
        module = model.get_submodule(f"{stack.path}.{index}")
        skip = [s.module.removeprefix(f"{block.path}.") for s in block.sublayers if s.kind in caching]
        for name, part in module.named_modules():
            if hasattr(part, "layer_idx") and not any(name == p or name.startswith(f"{p}.") for p in skip):
                put(part, "layer_idx", index)


def _renumber(module: nn.Module, number: int, put: Setter) -> None:
    for part in module.modules():
        if getattr(part, "layer_idx", None) is not None:
            put(part, "layer_idx", number)
