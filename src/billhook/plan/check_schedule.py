"""Is this schedule possible on this model?"""

from __future__ import annotations

from billhook.plan.address import Address
from billhook.plan.check import check, unsound
from billhook.plan.errors import InputError
from billhook.plan.outline import Outline
from billhook.plan.plan import Plan
from billhook.plan.schedule import Schedule


def check_schedule(schedule: Schedule, outline: Outline) -> None:
    """Raise InputError with the reason if it is not.

    What a constant schedule leaves out must be what a plan may drop. Tables that take turns leave nothing out for good,
    so there it is enough that the units exist.
    """
    known = {a for a, _ in outline.blocks()} | {a for a, _ in outline.sublayers()}
    for site in (site for table in schedule.tables for site in table):
        if site.unit not in known:
            extent = ", ".join(f"{s.name}.0 to {s.name}.{len(s.blocks) - 1}" for s in outline.stacks)
            raise InputError(f"unit {site.unit} of the schedule is not in this {outline.family} model; it has {extent}")
    if not schedule.constant:
        return
    gone = set(schedule.skips())
    for stack in outline.stacks:
        visits = schedule.order(stack.name, len(stack.blocks))
        gone |= {Address(stack.name, i) for i in range(len(stack.blocks)) if i not in visits}
        if visits != list(range(len(stack.blocks))):
            _check_pins(visits, stack.name, outline)
        longer = outline.not_shorter.get(stack.name)
        if longer is not None and len(visits) < len(schedule.order(longer, len(outline.stack(longer).blocks))):
            raise InputError(f"the schedule leaves {stack.name} with fewer visits than {longer}, which sizes its cache")
    check(Plan.of(gone), outline)
    reason = unsound(gone, outline)
    if reason:
        raise InputError(f"the schedule {reason}")


def _check_pins(visits: list[int], stack: str, outline: Outline) -> None:
    """A pinned block stays where it is: once, before all that come after it."""
    for unit, reason in outline.pinned.items():
        address = Address.parse(unit)
        if address.stack != stack or address.sublayer is not None or address.block not in visits:
            continue
        at = visits.index(address.block)
        if visits.count(address.block) > 1 or visits[:at] != list(range(address.block)):
            raise InputError(f"block {address} cannot be moved or repeated: {reason}")
