"""In which order blocks run once a plan is carried out, and which of them with the weights of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from billhook.plan.address import Address
from billhook.plan.check import normalise, survivors
from billhook.plan.check_schedule import check_schedule
from billhook.plan.errors import InputError
from billhook.plan.outline import Outline
from billhook.plan.plan import Plan
from billhook.plan.target import Target

Orders = dict[str, list[int]]
"""Stack -> original numbers of the blocks that run, in order."""


def orders(plan: Plan, outline: Outline) -> Orders:
    """For each stack. InputError for a schedule that does not fit the model, the drops or the target of the plan, or
    that changes from step to step: no model can be cut to that."""
    schedule = plan.schedule
    if schedule is None:
        drops = normalise(plan.drops, outline)
        return {stack.name: survivors(drops, outline, stack.name) for stack in outline.stacks}
    if not schedule.constant:
        raise InputError("a schedule that changes from step to step cannot be compiled away")
    check_schedule(schedule, outline)
    both = sorted(plan.drops & {site.unit for site in schedule.tables[0] if site.verb in ("run", "repeat")})
    if both:
        raise InputError(f"unit {both[0]} is dropped by the plan, and its schedule runs it")
    drops = normalise(plan.drops | schedule.skips(), outline)
    found = {
        stack.name: [i for i in schedule.order(stack.name, len(stack.blocks)) if Address(stack.name, i) not in drops]
        for stack in outline.stacks
    }
    if plan.target in (Target.UNIFORM, Target.DECI) and any(repeated(order) for order in found.values()):
        raise InputError(
            f"target {plan.target} cannot carry blocks that share weights: its checkpoints have those of every block; "
            f"use target remote or any"
        )
    return found


def repeated(order: Sequence[int]) -> bool:
    """Whether any block runs more than once."""
    return len(set(order)) < len(order)


def unvisited(orders: Mapping[str, Sequence[int]], outline: Outline) -> frozenset[Address]:
    """The blocks that never run."""
    return frozenset(a for a, _ in outline.blocks() if a.block not in orders[a.stack])


def shared(plan: Plan, outline: Outline) -> dict[Address, Address]:
    """The blocks that run with the weights of another one, and which: each that the plan does not drop stands for one
    visit of the schedule, in order. Empty where a stack has another number of visits, and is reordered or looped."""
    if plan.schedule is None or not plan.schedule.constant:
        return {}
    drops = normalise(plan.drops | plan.schedule.skips(), outline)
    found: dict[Address, Address] = {}
    for name, order in orders(plan.model_copy(update={"target": Target.ANY}), outline).items():
        left = survivors(drops, outline, name)
        if len(left) == len(order):
            found |= {Address(name, a): Address(name, b) for a, b in zip(left, order, strict=True) if a != b}
    return found
