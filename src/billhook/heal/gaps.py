"""What the acts that combine blocks have in common: where blocks go, and which parameters stand for which."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from billhook.anatomy.types import Anatomy, Block, Stack
from billhook.heal.healing import require_no_channels, require_no_masks
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.surgery.live import drops_of

Names = dict[str, str]
"""Name inside a block -> name of the parameter in the model."""


def whole_blocks(anatomy: Anatomy, plan: Plan | Iterable[Address], act: str) -> tuple[Stack, list[int]]:
    """The stack and the numbers of its blocks that a plan drops. InputError if it drops anything but whole blocks of
    one stack."""
    require_no_masks(plan, act)
    require_no_channels(plan, act)
    require_own_weights(plan)
    drops = sorted(drops_of(plan, anatomy))
    parts = [unit for unit in drops if unit.sublayer is not None]
    if parts:
        raise InputError(f"{act} takes whole blocks; the plan drops {parts[0]} and leaves the rest of its block")
    stacks = {unit.stack for unit in drops}
    if len(stacks) != 1:
        raise InputError(f"{act} takes one stack at a time; the plan drops {' and '.join(sorted(stacks)) or 'nothing'}")
    return anatomy.stack(stacks.pop()), [unit.block for unit in drops]


def runs(dropped: list[int]) -> list[list[int]]:
    """Adjacent numbers together."""
    found: list[list[int]] = []
    for number in dropped:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return found


def require_own_weights(plan: object) -> None:
    """InputError for a plan after which blocks share weights: what is good for one of them is not for the other."""
    if isinstance(plan, Plan) and plan.schedule is not None:
        raise InputError("the plan has blocks share weights or run in another order; such a model cannot be healed")


def names_in(model: nn.Module, block: Block) -> Names:
    """All parameters of a block."""
    return {name: f"{block.path}.{name}" for name, _ in model.get_submodule(block.path).named_parameters()}


def alike(model: nn.Module, one: Names, other: Names) -> bool:
    """Whether two blocks have the same parameters, of the same shapes."""
    return one.keys() == other.keys() and all(
        model.get_parameter(one[name]).shape == model.get_parameter(other[name]).shape for name in one
    )
