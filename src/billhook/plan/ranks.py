"""Can these linears be taken apart, and can the target say it?"""

from __future__ import annotations

from collections.abc import Collection

from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.outline import Outline
from billhook.plan.plan import Plan
from billhook.plan.target import Target

Ranks = dict[tuple[Address, str], int]  # (block, path of a linear in it) -> how wide its two parts are in between


def check_factors(plan: Plan, drops: Collection[Address], outline: Outline) -> None:
    """Raise InputError with the reason if a linear cannot be taken apart as the plan says."""
    sublayers = dict(outline.sublayers())
    narrower, sparse = ({edit.unit for edit in edits} for edits in (plan.keeps, plan.sparsities))
    seen: set[tuple[Address, str]] = set()
    for edit in plan.factors:
        what = f"{edit.linear} of {edit.unit}"
        if edit.unit not in sublayers:
            raise InputError(f"unit {edit.unit} is no sublayer of this {outline.family} model")
        useful = sublayers[edit.unit].useful
        if edit.linear not in useful:
            raise InputError(f"{what} cannot be taken apart; {_those(useful)}")
        if edit.unit in drops or edit.unit.parent in drops:
            raise InputError(f"unit {edit.unit} is dropped, so {edit.linear} cannot be taken apart")
        if edit.unit in narrower and edit.linear not in sublayers[edit.unit].mixtures:
            raise InputError(f"unit {edit.unit} is both kept in part and taken apart; a plan does one of them to it")
        if edit.unit in sparse:
            raise InputError(f"unit {edit.unit} is both made sparse and taken apart: two dense linears keep no zeros")
        if (edit.unit, edit.linear) in seen:
            raise InputError(f"the plan takes {what} apart twice")
        if not 1 <= edit.rank <= useful[edit.linear]:
            raise InputError(
                f"{what}: rank {edit.rank} saves nothing; two linears are smaller than one from rank 1 to "
                f"{useful[edit.linear]}"
            )
        seen.add((edit.unit, edit.linear))
    if plan.factors and plan.target in (Target.UNIFORM, Target.DECI):
        raise InputError(f"target {plan.target} cannot carry linears in two parts; use target remote or any")


def _those(linears: Collection[str]) -> str:
    return f"those that can are {', '.join(linears)}" if linears else "none of its linears is a module of its own"
