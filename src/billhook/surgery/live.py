"""The one mechanism behind ``simulate`` and ``apply``: cutting a live model in place, with a way back."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from billhook.anatomy import Anatomy
from billhook.anatomy.slots import assign_slots
from billhook.anatomy.stubs import STUBS
from billhook.anatomy.undo import Undo
from billhook.anatomy.visits import require_sharable, visit
from billhook.plan.address import Address
from billhook.plan.channels import thinning
from billhook.plan.check import check, normalise, survivors
from billhook.plan.plan import Drop, HiddenChannels, Keep, Plan
from billhook.plan.visits import Orders, orders, unvisited
from billhook.plan.widths import narrowing
from billhook.surgery.factorise import Factor, factorise
from billhook.surgery.low_rank_experts import take_apart
from billhook.surgery.masks import Masks, put_masks
from billhook.surgery.narrow import narrow, state
from billhook.surgery.thin import thin


def drops_of(plan: Plan | Iterable[Address], anatomy: Anatomy) -> frozenset[Address]:
    """The units that a plan drops, checked against the model and in shortest form; what a constant schedule leaves out
    included, so that these are the units whose weights go."""
    if not isinstance(plan, Plan):
        plan = Plan.of(plan)
    if plan.schedule is not None:
        more = unvisited(orders(plan, anatomy.outline), anatomy.outline) | plan.schedule.skips()
        others = (edit for edit in plan.edits if not isinstance(edit, Drop))
        plan = plan.model_copy(update={"edits": (*Plan.of(plan.drops | more).edits, *others), "schedule": None})
    check(plan, anatomy.outline)
    return normalise(plan.drops, anatomy.outline)


def keeps_of(plan: Plan | Iterable[Address], anatomy: Anatomy) -> tuple[Keep, ...]:
    """The keeps of a (checked) plan that remove anything."""
    return narrowing(plan.keeps, anatomy.outline) if isinstance(plan, Plan) else ()


def channels_of(plan: Plan | Iterable[Address], anatomy: Anatomy) -> tuple[HiddenChannels, ...]:
    """The streams that a (checked) plan makes narrower."""
    return thinning(plan.channels, anatomy.outline) if isinstance(plan, Plan) else ()


def orders_of(plan: Plan | Iterable[Address], anatomy: Anatomy) -> Orders:
    """Which blocks of each stack run, in order, by a (checked) plan."""
    return orders(plan if isinstance(plan, Plan) else Plan.of(plan), anatomy.outline)


def cut(
    model: nn.Module,
    anatomy: Anatomy,
    drops: frozenset[Address],
    keeps: tuple[Keep, ...],
    masks: Masks,
    undo: Undo,
    orders: Orders,
    factors: tuple[Factor, ...] = (),
    channels: tuple[HiddenChannels, ...] = (),
    mixtures: tuple[tuple[str, int], ...] = (),
) -> None:
    """Carry out a whole plan in place. Afterwards the model is what its stock class would build from the new config,
    but for the stubs, for widths that differ from block to block, for linears in two parts, and for blocks that share
    their weights. Masks come first: they are of whole weights."""
    for stack in anatomy.stacks:
        require_sharable(model, stack, orders[stack.name])
    put_masks(model, masks, undo.set)
    state(model, anatomy, keeps, drops, undo.set)
    narrow(model, anatomy, keeps, undo.set)
    factorise(model, factors, undo.swap)
    take_apart(model, mixtures, undo.swap)
    thin(model, anatomy, channels, undo.set)
    drop(model, anatomy, drops, undo, orders)


def drop(
    model: nn.Module, anatomy: Anatomy, drops: frozenset[Address], undo: Undo, orders: Orders | None = None
) -> None:
    """Drop units in place: stubs for sublayers, other lists for blocks, then configs and cache slots that fit.

    No weight is copied or changed.
    """
    for address in sorted(a for a in drops if a.sublayer is not None):
        for cut in anatomy.sublayer(address).cuts:
            undo.swap(model, cut.path, STUBS[cut.stub]())
    for stack in anatomy.stacks:
        order = survivors(drops, anatomy.outline, stack.name) if orders is None else orders[stack.name]
        moved = order != list(range(len(stack.blocks)))
        if moved:
            visit(model, stack, order, undo)
        if moved or any(a.stack == stack.name for a in drops):
            assign_slots(model, stack, drops, undo.set, order)
