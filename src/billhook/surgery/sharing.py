"""What a config says about blocks that share the weights of another one, and how a model gets to be like that.

A config gets ``shared_blocks`` {stack: {block: the earlier block whose weights it has}}. Block numbers are those of the
model that the config describes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from billhook.anatomy import Anatomy
from billhook.anatomy.undo import Undo
from billhook.anatomy.visits import note_ties, ties_between
from billhook.anatomy.vocabulary import SHARED_BLOCKS
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.surgery.skips import by_config, part_of

Shared = dict[Address, int]
"""Block -> number of the earlier block of its stack whose weights it has."""


def shared_after(orders: Mapping[str, Sequence[int]]) -> Shared:
    """In the numbers of a model whose stacks run these blocks of another one."""
    return {
        Address(stack, new): first
        for stack, order in orders.items()
        for new, old in enumerate(order)
        if (first := list(order).index(old)) < new
    }


def read_shared(config: Any, anatomy: Anatomy) -> Shared:
    """What a model's config lists. InputError if it lists something that the model has no place for."""
    found: Shared = {}
    for owner, stacks in by_config(anatomy).items():
        table: Any = getattr(part_of(config, owner), SHARED_BLOCKS, None) or {}
        try:
            rows = [
                (str(stack), int(new), int(first)) for stack, blocks in table.items() for new, first in blocks.items()
            ]
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(f"config.json: {owner}.{SHARED_BLOCKS} is not a map of stack -> block -> block") from error
        lengths = {stack.name: len(stack.blocks) for stack in stacks}
        for stack, new, first in rows:
            if not 0 <= first < new < lengths.get(stack, 0) or str(first) in table[stack]:
                raise InputError(
                    f"config.json: {stack}.{new} cannot have the weights of {stack}.{first}: name an earlier block of "
                    f"this {anatomy.family} model that has its own"
                )
            found[Address(stack, new)] = first
    return found


def write_shared(config: Any, anatomy: Anatomy, shared: Shared) -> None:
    """Note what is shared in a config whose block counts already are those of the smaller model, in place."""
    for owner, stacks in by_config(anatomy).items():
        part = part_of(config, owner)
        vars(part).pop(SHARED_BLOCKS, None)
        table: dict[str, dict[str, int]] = {}
        for address, first in sorted(shared.items()):
            if address.stack in {stack.name for stack in stacks}:
                table.setdefault(address.stack, {})[str(address.block)] = first
        if table:
            setattr(part, SHARED_BLOCKS, table)


def share(model: nn.Module, anatomy: Anatomy, shared: Shared) -> None:
    """Give blocks of a model that is being built the weights of others, in place."""
    for address, first in shared.items():
        path = anatomy.stack(address.stack).path
        new, old = (model.get_submodule(f"{path}.{number}") for number in (address.block, first))
        for name, parameter in old.named_parameters(remove_duplicate=False):
            inside, _, leaf = name.rpartition(".")
            setattr(new.get_submodule(inside), leaf, parameter)
        note_ties(model, ties_between(new, f"{path}.{address.block}", f"{path}.{first}"), Undo())
