"""What a config says about linears that have a bias where their stock class has none.

``added_biases`` {stack: {block: [path in the block]}}, beside ``inner_units``. Block numbers are those of the model
that the config describes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from billhook.anatomy import Anatomy
from billhook.plan.address import Address
from billhook.plan.check import survivors
from billhook.plan.errors import InputError
from billhook.surgery.skips import PER_STACK_BIASES, by_config, part_of

Biases = frozenset[tuple[Address, str]]  # (block, path of a linear in it)


def read_biases(config: Any, anatomy: Anatomy) -> Biases:
    """The linears that a model's config lists. InputError if it lists what is no linear of the model."""
    found = set()
    for owner in by_config(anatomy):
        table = getattr(part_of(config, owner), PER_STACK_BIASES, None) or {}
        try:
            found |= {
                (Address(stack, int(block)), str(path))
                for stack, blocks in table.items()
                for block, paths in blocks.items()
                for path in paths
            }
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(
                f"config.json: {owner}.{PER_STACK_BIASES} is not a map of stack -> block -> list of linears"
            ) from error
    writes = {
        (s.address.parent, name.removeprefix(f"{block.path}.").removesuffix(".weight").removesuffix(".expand"))
        for stack in anatomy.stacks
        for block in stack.blocks
        for s in block.sublayers
        for name in s.writes
    }
    for block, path in sorted(found - writes):
        raise InputError(f"config.json gives {path} of {block} a bias; this {anatomy.family} model has no such linear")
    return frozenset(found)


def biases_after(before: Biases, drops: frozenset[Address], anatomy: Anatomy) -> Biases:
    """Which linears have one once ``drops`` are gone, in the block numbers of the smaller model."""
    moved = {
        Address(stack.name, old): Address(stack.name, new)
        for stack in anatomy.stacks
        for new, old in enumerate(survivors(drops, anatomy.outline, stack.name))
    }
    gone = {f"{cut.path}." for a in drops if a.sublayer is not None for cut in anatomy.sublayer(a).cuts}
    return frozenset(
        (moved[block], path)
        for block, path in before
        if block in moved and not f"{anatomy.block(block).path}.{path}.".startswith(tuple(gone))
    )


def write_biases(config: Any, anatomy: Anatomy, biases: Biases) -> None:
    """Note added biases in a config, in place of those that it lists."""
    for owner, stacks in by_config(anatomy).items():
        part = part_of(config, owner)
        vars(part).pop(PER_STACK_BIASES, None)
        table: dict[str, dict[str, list[str]]] = {}
        for block, path in sorted(biases):
            if block.stack in {stack.name for stack in stacks}:
                table.setdefault(block.stack, {}).setdefault(str(block.block), []).append(path)
        if table:
            setattr(part, PER_STACK_BIASES, table)


def add_biases(model: nn.Module, paths: Iterable[str]) -> None:
    """Give linears a bias, for a file to fill."""
    for path in paths:
        weight = model.get_submodule(path).get_parameter("weight")
        model.get_submodule(path).bias = nn.Parameter(torch.zeros_like(weight[:, 0]))


def note_biases(config: Any, anatomy: Anatomy, names: Iterable[str]) -> None:
    """Add these new parameters, by name in the model that ``anatomy`` describes, to what its config lists."""
    added = {
        (block.address, name.removeprefix(f"{block.path}.").removesuffix(".bias"))
        for name in names
        for stack in anatomy.stacks
        for block in stack.blocks
        if name.startswith(f"{block.path}.")
    }
    if added:
        write_biases(config, anatomy, read_biases(config, anatomy) | added)
