"""Is this plan possible on this model, and can its target carry it?"""

from __future__ import annotations

from collections.abc import Iterable

from billhook.plan.address import Address
from billhook.plan.channels import check_channels
from billhook.plan.errors import InputError
from billhook.plan.masks import check_masks
from billhook.plan.outline import Outline
from billhook.plan.plan import Plan
from billhook.plan.ranks import check_factors
from billhook.plan.target import Target
from billhook.plan.widths import check_keeps

_DECI_FIRST = "DeciLM loaders fail when the first block that is left has no attention"


def normalise(drops: Iterable[Address], outline: Outline) -> frozenset[Address]:
    """The same removal in its shortest form.

    A sublayer inside a dropped block is redundant; a block whose every sublayer is dropped is a dropped block, where
    nothing else of it acts on the stream (``rest_params`` is 0: a post-norm block would keep its norms).
    """
    drops = set(drops)
    for address, block in outline.blocks():
        inside = {Address(address.stack, address.block, kind) for kind in block.sublayers}
        if inside and inside <= drops and block.rest_params == 0 and str(address) not in outline.pinned:
            drops.add(address)
        if address in drops:
            drops -= inside
    return frozenset(drops)


def units(outline: Outline, kind: str, target: Target = Target.ANY) -> list[Address]:
    """All units of a kind ("block", "sublayer", or one of the sublayer names) that a plan for ``target`` may drop."""
    if kind == "block":
        candidates = [address for address, _ in outline.blocks()]
    else:
        candidates = [a for a, _ in outline.sublayers() if kind in ("sublayer", a.sublayer)]
    allowed = [a for a in candidates if str(a) not in outline.pinned and _target_refusal(a, outline, target) is None]
    return sorted(allowed)


def check(plan: Plan, outline: Outline) -> None:
    """Raise InputError with the reason if the plan cannot be carried out on this model for its target."""
    check_target(plan.target, outline)
    known = {str(a) for a, _ in outline.blocks()} | {str(a) for a, _ in outline.sublayers()}
    for address in sorted(plan.drops):
        if address.inner is not None:
            raise InputError(f"unit {address} cannot be dropped by itself; say which {address.inner}s to keep")
        if str(address) not in known:
            raise InputError(f"unit {address} is not in this {outline.family} model; it has {_extent(outline)}")
        if str(address) in outline.pinned:
            raise InputError(f"unit {address} cannot be dropped: {outline.pinned[str(address)]}")
    drops = normalise(plan.drops, outline)
    for address in sorted(drops):
        reason = _target_refusal(address, outline, plan.target)
        if reason:
            raise InputError(f"unit {address} cannot be dropped for target {plan.target}: {reason}")
    reason = unsound(drops, outline)
    if reason:
        raise InputError(f"the plan {reason}")
    check_keeps(plan, drops, outline)
    check_masks(plan, drops, outline)
    check_factors(plan, drops, outline)
    check_channels(plan, outline)
    for stack in outline.stacks:
        first = Address(stack.name, survivors(drops, outline, stack.name)[0], "attention")
        if plan.target is Target.DECI and first in drops:  # the blocks before it are gone, so it comes first
            raise InputError(f"unit {first} cannot be dropped for target {plan.target}: {_DECI_FIRST}")


def check_target(target: Target, outline: Outline) -> None:
    """Raise InputError if no plan for ``target`` is possible for this family."""
    if target in outline.refused:
        raise InputError(f"target {target} is not possible for this {outline.family} model: {outline.refused[target]}")


def unsound(drops: Iterable[Address], outline: Outline) -> str | None:
    """What these drops do that no model of this kind survives, or None: a search asks before it tries them."""
    drops = normalise(drops, outline)
    left = {stack.name: survivors(drops, outline, stack.name) for stack in outline.stacks}
    for stack in outline.stacks:
        if not left[stack.name]:
            return f"drops every block of {stack.name}; at least one must stay"
        attending = (i for i in left[stack.name] if "attention" in stack.blocks[i].sublayers)
        if stack.causal and all(Address(stack.name, i, "attention") in drops for i in attending):
            return f"drops every attention of {stack.name}; at least one must stay to count positions"
        longer = outline.not_shorter.get(stack.name)
        if longer is not None and len(left[stack.name]) < len(left[longer]):
            return f"leaves {stack.name} with fewer blocks than {longer}, which sizes its cache by them"
    return None


def survivors(drops: Iterable[Address], outline: Outline, stack: str) -> list[int]:
    """Original numbers of the blocks of a stack that are left, in order."""
    gone = {a.block for a in drops if a.stack == stack and a.sublayer is None}
    return [i for i in range(len(outline.stack(stack).blocks)) if i not in gone]


def _target_refusal(address: Address, outline: Outline, target: Target) -> str | None:
    if target is Target.UNIFORM and address.sublayer is not None:
        return "an ordinary checkpoint has the same sublayers in every block, so only whole blocks can go"
    if target is Target.DECI and address.sublayer == "attention" and address.block == 0:
        return _DECI_FIRST
    return None


def _extent(outline: Outline) -> str:
    stacks = (f"{s.name}.0 to {s.name}.{len(s.blocks) - 1}" for s in outline.stacks)
    kinds = dict.fromkeys(kind for _, block in outline.blocks() for kind in block.sublayers)
    return f"{', '.join(stacks)}, each with {' and '.join(kinds)}"
