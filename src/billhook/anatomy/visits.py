"""A stack wired anew: which of its blocks run, in which order, and which of them more than once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from billhook.anatomy.config import owners, resolve, shortened
from billhook.anatomy.low_rank import is_conv
from billhook.anatomy.types import Stack
from billhook.anatomy.undo import Undo
from billhook.plan.errors import InputError

Ties = dict[str, str]
"""Name of a parameter -> name of the one that it is the same as."""
_TIES = ("all_tied_weights_keys", "_tied_weights_keys")  # where transformers looks when it loads and when it saves


def visit(model: nn.Module, stack: Stack, order: Sequence[int], undo: Undo) -> None:
    """The list of blocks holds ``order`` (numbers of ``stack.blocks``), and the configs count that.

    A further visit of a block is a twin of its module tree around the same weights, which can have cache slots of its
    own; the model knows them as tied, so that they are saved once. No weight is copied.
    """
    blocks: list[nn.Module] = []
    first: dict[int, int] = {}
    ties: Ties = {}
    for new, old in enumerate(order):
        block = model.get_submodule(stack.blocks[old].path)
        if old in first:
            ties |= ties_between(block, f"{stack.path}.{new}", f"{stack.path}.{first[old]}")
        blocks.append(_twin(block) if old in first else block)
        first.setdefault(old, new)
    undo.swap(model, stack.path, nn.ModuleList(blocks))
    for path, keys in owners(stack).items():
        config = resolve(model, path)
        for key, value in shortened(config, keys, list(order), len(stack.blocks)).items():
            undo.set(config, key, value)
    note_ties(model, ties, undo)


def ties_between(block: nn.Module, new: str, first: str) -> Ties:
    """The parameters of a block at the path ``new`` are those at the path ``first``."""
    return {f"{new}.{name}": f"{first}.{name}" for name, _ in block.named_parameters(remove_duplicate=False)}


def note_ties(model: nn.Module, ties: Ties, undo: Undo) -> None:
    """Tell transformers which parameters are the same."""
    if ties:
        for name in _TIES:
            undo.own(model, name, {**(getattr(model, name, None) or {}), **ties})


def require_sharable(model: nn.Module, stack: Stack, order: Sequence[int]) -> None:
    """InputError if a block that runs more than once holds what transformers cannot tie."""
    for old in sorted({old for old in order if list(order).count(old) > 1}):
        block, address = model.get_submodule(stack.blocks[old].path), stack.blocks[old].address
        parameters = {name for name, _ in block.named_parameters(remove_duplicate=False)}
        if buffers := sorted(block.state_dict().keys() - parameters):
            raise InputError(f"{address} cannot stand for another block: {buffers[0]} of it is stored and no parameter")
        for name, part in block.named_modules():
            if is_conv(part):  # it would take the weight for an embedding and shorten the bias
                raise InputError(f"{address} cannot stand for another block: {name} keeps its weight transposed")


def _twin(block: nn.Module) -> nn.Module:
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
    shared |= {id(part.config): part.config for part in block.modules() if hasattr(part, "config")}
    return copy.deepcopy(block, memo=shared)
