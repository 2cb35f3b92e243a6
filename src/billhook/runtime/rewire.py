"""A constant schedule carried out on the live model: its lists of blocks are wired anew."""

from __future__ import annotations

import copy

from torch import nn
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy, Stack
from billhook.anatomy.config import owners, resolve, shortened
from billhook.anatomy.slots import assign_slots
from billhook.anatomy.stubs import STUBS
from billhook.anatomy.undo import Undo
from billhook.plan.check_schedule import check_schedule
from billhook.plan.schedule import Schedule


def rewire(model: PreTrainedModel, anatomy: Anatomy, schedule: Schedule, undo: Undo) -> None:
    """Make the model run a constant schedule, until ``undo`` is restored.

    Nothing is decided while the model runs: its stacks hold the visits of the schedule in order and its config counts
    them, so generation, static caches and ``torch.compile`` see an ordinary model. A further visit of a block is a twin
    of its module tree around the same weights, with cache slots of its own. No weight is copied. Raises InputError
    where the schedule is not possible on this model, which is untouched then.
    """
    check_schedule(schedule, anatomy.outline)
    skips = schedule.skips()
    for address in sorted(a for a in skips if a.sublayer is not None):
        for cut in anatomy.sublayer(address).cuts:
            undo.swap(model, cut.path, STUBS[cut.stub]())
    for stack in anatomy.stacks:
        order = schedule.order(stack.name, len(stack.blocks))
        moved = order != list(range(len(stack.blocks)))
        if moved:
            _visit(model, stack, order, undo)
        if moved or any(a.stack == stack.name for a in skips):
            assign_slots(model, stack, skips, undo.set, order)


def _visit(model: PreTrainedModel, stack: Stack, order: list[int], undo: Undo) -> None:
    blocks, seen = [], set()
    for index in order:
        block = model.get_submodule(stack.blocks[index].path)
        blocks.append(_twin(block) if index in seen else block)
        seen.add(index)
    undo.swap(model, stack.path, nn.ModuleList(blocks))
    for path, keys in owners(stack).items():
        config = resolve(model, path)
        for key, value in shortened(config, keys, order, len(stack.blocks)).items():
            undo.set(config, key, value)


def _twin(block: nn.Module) -> nn.Module:
    """The same weights under another module tree, which can carry other cache slots."""
    shared: dict[int, object] = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
    shared |= {id(part.config): part.config for part in block.modules() if hasattr(part, "config")}
    return copy.deepcopy(block, memo=shared)
