"""What a config says about linears that are in two parts.

``linear_ranks`` {stack: {block: {path in the block: rank}}}, beside ``inner_units``. Block numbers are those of the
model that the config describes. The path ``bridge`` is that of one which the stock class does not have (see
``anatomy.bridge``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from billhook.anatomy import Anatomy
from billhook.anatomy.bridge import BRIDGE
from billhook.plan.address import Address
from billhook.plan.check import survivors
from billhook.plan.errors import InputError
from billhook.plan.plan import Factorise
from billhook.plan.ranks import Ranks
from billhook.surgery.skips import PER_STACK_RANKS, by_config, part_of


def read_ranks(config: Any, anatomy: Anatomy) -> Ranks:
    """The ranks that a model's config lists. InputError if it lists them in another form, or for blocks that the model
    does not have."""
    found: Ranks = {}
    for owner in by_config(anatomy):
        table = getattr(part_of(config, owner), PER_STACK_RANKS, None) or {}
        try:
            found |= {
                (Address(stack, int(block)), path): int(rank)
                for stack, blocks in table.items()
                for block, linears in blocks.items()
                for path, rank in linears.items()
            }
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"config.json: {owner}.{PER_STACK_RANKS} is not a map of stack -> block -> linear -> rank"
            ) from error
    known = {block.address for stack in anatomy.stacks for block in stack.blocks}
    for (block, path), rank in found.items():
        if block not in known or rank < 1:
            raise InputError(
                f"config.json gives {path} of {block} rank {rank}; this {anatomy.family} model cannot have it"
            )
    return found


def ranks_after(before: Ranks, drops: frozenset[Address], factors: Iterable[Factorise], anatomy: Anatomy) -> Ranks:
    """Which linears are in two parts once a plan is carried out, in the block numbers of the smaller model."""
    moved = {
        Address(stack.name, old): Address(stack.name, new)
        for stack in anatomy.stacks
        for new, old in enumerate(survivors(drops, anatomy.outline, stack.name))
    }
    now = before | {(edit.unit.parent, edit.linear): edit.rank for edit in factors}
    gone = {
        (a.parent, f"{cut.path}.".removeprefix(f"{anatomy.block(a.parent).path}."))
        for a in drops
        if a.sublayer is not None
        for cut in anatomy.sublayer(a).cuts
    }
    return {
        (moved[block], path): rank
        for (block, path), rank in sorted(now.items())
        if block in moved and not any(block == b and f"{path}.".startswith(cut) for b, cut in gone)
    }


def write_ranks(config: Any, anatomy: Anatomy, ranks: Ranks) -> None:
    """Note ranks in a config, in place of those that it lists."""
    for owner, stacks in by_config(anatomy).items():
        part = part_of(config, owner)
        vars(part).pop(PER_STACK_RANKS, None)
        table: dict[str, Any] = {}
        for (block, path), rank in ranks.items():
            if block.stack in {stack.name for stack in stacks}:
                table.setdefault(block.stack, {}).setdefault(str(block.block), {})[path] = rank
        if table:
            setattr(part, PER_STACK_RANKS, table)


def note_bridges(config: Any, anatomy: Anatomy, bridges: Mapping[str, int]) -> None:
    """Add bridges, by the path of their block in the model that ``anatomy`` describes, to what its config lists."""
    blocks = {block.path: block.address for stack in anatomy.stacks for block in stack.blocks}
    if bridges:
        added = {(blocks[path], BRIDGE): rank for path, rank in bridges.items()}
        write_ranks(config, anatomy, read_ranks(config, anatomy) | added)
