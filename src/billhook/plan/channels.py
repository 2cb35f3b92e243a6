"""Can so many channels of a residual stream go, and can the target say it?"""

from __future__ import annotations

from collections.abc import Iterable

from billhook.plan.errors import InputError
from billhook.plan.outline import Outline
from billhook.plan.plan import HiddenChannels, Plan
from billhook.plan.target import Target


def thinning(edits: Iterable[HiddenChannels], outline: Outline) -> tuple[HiddenChannels, ...]:
    """Those of the (checked) edits that remove anything."""
    return tuple(edit for edit in edits if len(edit.indices) < outline.stack(edit.stack).hidden_size)


def channel_counts(edits: Iterable[HiddenChannels]) -> dict[str, int]:
    """How many channels the stream of each stack keeps."""
    return {edit.stack: len(edit.indices) for edit in edits}


def check_channels(plan: Plan, outline: Outline) -> None:
    """Raise InputError with the reason if the plan's hidden channels cannot go from this model for its target."""
    stacks = {stack.name: stack for stack in outline.stacks}
    seen: set[str] = set()
    for edit in plan.channels:
        what = f"the hidden channels of {edit.stack}"
        if edit.stack not in stacks:
            raise InputError(f"this {outline.family} model has no {edit.stack}; it has {', '.join(stacks)}")
        if edit.stack in seen:
            raise InputError(f"the plan keeps {what} twice; one list says it all")
        seen.add(edit.stack)
        stack = stacks[edit.stack]
        if not stack.channel_multiple:
            raise InputError(f"{what} of this {outline.family} model cannot be cut: {stack.rigid}")
        if not edit.indices:
            raise InputError(f"{what}: none is kept")
        if any(a >= b for a, b in zip(edit.indices, edit.indices[1:], strict=False)):
            raise InputError(f"{what}: indices must rise")
        odd = [index for index in (edit.indices[0], edit.indices[-1]) if not 0 <= index < stack.hidden_size]
        if odd:
            raise InputError(f"{what} are numbered from 0 to {stack.hidden_size - 1}; there is no {odd[0]}")
        if len(edit.indices) % stack.channel_multiple:
            raise InputError(
                f"{what}: {len(edit.indices)} are left, and this {outline.family} model takes multiples of "
                f"{stack.channel_multiple} only"
            )
    edits = thinning(plan.channels, outline)
    if not edits:
        return
    if plan.target is Target.DECI:
        raise InputError("hidden channels cannot be cut for target deci: its form has no width of a head of its own")
    if plan.sparsities or plan.factors:
        other = "makes weights sparse" if plan.sparsities else "takes linears apart"
        raise InputError(f"the plan both cuts hidden channels and {other}; cut them first, and go on from the result")
    sublayers = dict(outline.sublayers())
    for keep in plan.keeps:  # checked before
        if sublayers[keep.unit].inner[keep.inner].divides:
            raise InputError(
                f"the plan cuts both hidden channels and {keep.inner}s of {keep.unit}, and the config of this "
                f"{outline.family} model ties their numbers; cut one of them"
            )
