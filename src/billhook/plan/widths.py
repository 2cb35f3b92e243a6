"""Is this narrowing possible, and can the target say it?"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.outline import InnerOutline, Outline
from billhook.plan.plan import Keep, Plan
from billhook.plan.target import Target

Counts = dict[tuple[Address, str], int]  # (sublayer, kind of inner unit) -> how many are left


def narrowing(keeps: Iterable[Keep], outline: Outline) -> tuple[Keep, ...]:
    """Those of the (checked) edits that remove anything."""
    sublayers = dict(outline.sublayers())
    return tuple(keep for keep in keeps if len(keep.indices) < sublayers[keep.unit].inner[keep.inner].count)


def counts(keeps: Iterable[Keep]) -> Counts:
    return {(keep.unit, keep.inner): len(keep.indices) for keep in keeps}


def check_keeps(plan: Plan, drops: Collection[Address], outline: Outline) -> None:
    """Raise InputError with the reason if a keep of the plan cannot be carried out on this model for its target."""
    sublayers = dict(outline.sublayers())
    seen: set[tuple[Address, str]] = set()
    for keep in plan.keeps:
        if keep.unit not in sublayers:
            raise InputError(f"unit {keep.unit} is no sublayer of this {outline.family} model")
        inner = sublayers[keep.unit].inner.get(keep.inner)
        if inner is None:
            reason = sublayers[keep.unit].rigid or f"it has no {keep.inner}s"
            raise InputError(f"the {keep.inner}s of {keep.unit} cannot be cut: {reason}")
        if (keep.unit, keep.inner) in seen:
            raise InputError(f"the plan keeps {keep.inner}s of {keep.unit} twice; one list says it all")
        if keep.unit in drops or keep.unit.parent in drops:
            raise InputError(f"unit {keep.unit} is both dropped and kept in part; a plan does one of them")
        seen.add((keep.unit, keep.inner))
        _check_indices(keep, inner)
    left = narrowing(plan.keeps, outline)
    sizes = common_sizes(outline.narrowed(counts(left)), drops)
    for keep in left:
        refused = _target_refusal(keep, sublayers[keep.unit].inner[keep.inner], sizes, plan.target)
        if refused:
            raise InputError(f"the {keep.inner}s of {keep.unit} cannot be cut for target {plan.target}: {refused}")


def common_sizes(outline: Outline, drops: Collection[Address]) -> dict[str, int | None]:
    """Config value that states a size -> what it would have to be, None where the sublayers that are left differ or
    the config refuses that number."""
    wanted: dict[str, set[int]] = {}
    refused: set[str] = set()
    for address, sublayer in outline.sublayers():
        for inner in sublayer.inner.values():
            if inner.key and address not in drops and address.parent not in drops:
                size = inner.amount * inner.count
                wanted.setdefault(inner.key, set()).add(size)
                if inner.divides and inner.divides % size:
                    refused.add(inner.key)
    return {key: min(sizes) if len(sizes) == 1 and key not in refused else None for key, sizes in wanted.items()}


def _check_indices(keep: Keep, inner: InnerOutline) -> None:
    what = f"the {keep.inner}s of {keep.unit}"
    if not keep.indices:
        raise InputError(f"{what}: none is kept; drop {keep.unit} instead")
    if any(a >= b for a, b in zip(keep.indices, keep.indices[1:], strict=False)):
        raise InputError(f"{what}: indices must rise")
    if odd := [i for i in keep.indices if not 0 <= i < inner.count]:
        raise InputError(f"{what} are numbered from 0 to {inner.count - 1}; there is no {odd[0]}")
    if len(keep.indices) < inner.least:
        raise InputError(f"{what}: {len(keep.indices)} are too few; the router needs {inner.least}")
    run = inner.count // inner.parts
    if len({sum(i // run == part for i in keep.indices) for part in range(inner.parts)}) > 1:
        raise InputError(f"{what}: the router needs equally many of each {run} in a row")


def _target_refusal(keep: Keep, inner: InnerOutline, sizes: dict[str, int | None], target: Target) -> str | None:
    if target is Target.UNIFORM:
        if not inner.key:
            return "the model's config has no value that could say how many are left"
        if sizes[inner.key] is None:
            return "an ordinary checkpoint has equally many in every block, of a number that its config takes"
    if target is Target.DECI and keep.inner != "neuron":
        return "DeciLM loaders give every attention the same query heads and know no experts"
    return None
