"""Policies that decide nothing while the model runs."""

from __future__ import annotations

from transformers import PreTrainedModel

from billhook.anatomy import Anatomy
from billhook.plan.schedule import Schedule
from billhook.runtime.attached import Attached
from billhook.runtime.counts import Counts, constant_visits
from billhook.runtime.rewire import rewire


def attach_schedule(model: PreTrainedModel, anatomy: Anatomy, schedule: Schedule, policy: object) -> Attached:
    """The model under a constant schedule; see ``rewire``."""
    units = [address for address, _ in anatomy.outline.sublayers()]
    orders = {stack.name: schedule.order(stack.name, len(stack.blocks)) for stack in anatomy.stacks}
    counts = Counts(visits=constant_visits(units, orders, schedule.skips()))
    return Attached(model, policy, counts, lambda undo: rewire(model, anatomy, schedule, undo))
