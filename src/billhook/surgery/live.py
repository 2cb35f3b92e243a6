"""The one mechanism behind ``simulate`` and ``apply``: cutting a live model in place, with a way back."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from billhook.anatomy import Anatomy, Stack
from billhook.anatomy.config import owners, resolve, shortened
from billhook.anatomy.slots import assign_slots
from billhook.anatomy.stubs import STUBS
from billhook.anatomy.undo import Undo
from billhook.plan.address import Address
from billhook.plan.check import check, normalise, survivors
from billhook.plan.plan import Drop, Keep, Plan
from billhook.plan.schedule import compiled
from billhook.plan.widths import narrowing
from billhook.surgery.factorise import Factor, factorise
from billhook.surgery.masks import Masks, put_masks
from billhook.surgery.narrow import narrow, state


def drops_of(plan: Plan | Iterable[Address], anatomy: Anatomy) -> frozenset[Address]:
    """The units that a plan drops, checked against the model and in shortest form; a schedule that only leaves out for
    good is compiled into them."""
    if not isinstance(plan, Plan):
        plan = Plan.of(plan)
    if plan.schedule is not None:
        more = compiled(plan.schedule, anatomy.outline)
        others = (edit for edit in plan.edits if not isinstance(edit, Drop))
        plan = plan.model_copy(update={"edits": (*Plan.of(plan.drops | more).edits, *others), "schedule": None})
    check(plan, anatomy.outline)
    return normalise(plan.drops, anatomy.outline)


def keeps_of(plan: Plan | Iterable[Address], anatomy: Anatomy) -> tuple[Keep, ...]:
    """The keeps of a (checked) plan that remove anything."""
    return narrowing(plan.keeps, anatomy.outline) if isinstance(plan, Plan) else ()


def cut(
    model: nn.Module,
    anatomy: Anatomy,
    drops: frozenset[Address],
    keeps: tuple[Keep, ...],
    masks: Masks,
    undo: Undo,
    factors: tuple[Factor, ...] = (),
) -> None:
    """Carry out a whole plan in place. Afterwards the model is what its stock class would build from the new config,
    but for the stubs, for widths that differ from block to block and for linears in two parts. Masks come first: they
    are of whole weights."""
    put_masks(model, masks, undo.set)
    state(model, anatomy, keeps, drops, undo.set)
    narrow(model, anatomy, keeps, undo.set)
    factorise(model, factors, undo.swap)
    drop(model, anatomy, drops, undo)


def drop(model: nn.Module, anatomy: Anatomy, drops: frozenset[Address], undo: Undo) -> None:
    """Drop units in place: stubs for sublayers, shorter lists for blocks, then configs and cache slots that fit.

    No weight is copied or changed.
    """
    for address in sorted(a for a in drops if a.sublayer is not None):
        for cut in anatomy.sublayer(address).cuts:
            undo.swap(model, cut.path, STUBS[cut.stub]())
    for stack in anatomy.stacks:
        if any(a.stack == stack.name for a in drops):
            _shorten(model, stack, survivors(drops, anatomy.outline, stack.name), undo)
            assign_slots(model, stack, drops, undo.set)


def _shorten(model: nn.Module, stack: Stack, kept: list[int], undo: Undo) -> None:
    if len(kept) == len(stack.blocks):
        return
    blocks = [model.get_submodule(stack.blocks[i].path) for i in kept]
    undo.swap(model, stack.path, nn.ModuleList(blocks))
    for path, keys in owners(stack).items():
        config = resolve(model, path)
        for key, value in shortened(config, keys, kept, len(stack.blocks)).items():
            undo.set(config, key, value)
