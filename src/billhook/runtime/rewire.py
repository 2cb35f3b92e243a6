"""A constant schedule carried out on the live model: its lists of blocks are wired anew."""

from __future__ import annotations

from transformers import PreTrainedModel

from billhook.anatomy import Anatomy
from billhook.anatomy.slots import assign_slots
from billhook.anatomy.stubs import STUBS
from billhook.anatomy.undo import Undo
from billhook.anatomy.visits import visit
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
            visit(model, stack, order, undo)
        if moved or any(a.stack == stack.name for a in skips):
            assign_slots(model, stack, skips, undo.set, order)
