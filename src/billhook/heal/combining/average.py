"""Blocks averaged with their neighbours: to merge several into one, or to refill one that was lost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from billhook.anatomy.types import Anatomy
from billhook.heal.gaps import Names, alike, names_in, whole_blocks
from billhook.heal.healing import Healing
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan

ACT = "averaging neighbours"


def average(model: nn.Module, anatomy: Anatomy, plan: Plan | Iterable[Address]) -> Healing:
    """Every dropped block goes into the nearest one that stays and is built alike, which becomes the mean of itself and
    all that go into it: each parameter, norms and biases too, W = (W + sum over the dropped of W_d) / (1 + their
    number). Of two that are equally near, the earlier one.

    Source: neighbour averaging of CheckFree ("All is Not Lost: LLM Recovery without Checkpoints"), where it fills the
    place of a lost stage (see ``refill``); here it is the last trace of a stage that is given up, and equal weights
    stand for the gradient norms that a finished model no longer has. Cost: the weights once, no data.

    Raises InputError unless whole blocks of one stack go, and where no block that stays is built like a dropped one (a
    mixture of experts beside a dense MLP, say).
    """
    stack, dropped = whole_blocks(anatomy, plan, ACT)
    names = [names_in(model, block) for block in stack.blocks]
    kept = [i for i in range(len(names)) if i not in dropped]
    joined: dict[int, list[int]] = {}
    for block in dropped:
        near = [i for i in kept if alike(model, names[i], names[block])]
        if not near:
            raise InputError(f"{ACT}: no block that stays is built like {stack.blocks[block].address}")
        joined.setdefault(min(near, key=lambda i: (abs(i - block), i)), []).append(block)
    tensors: dict[str, Tensor] = {}
    for receiver, donors in joined.items():
        tensors |= _mean(model, names[receiver], [names[i] for i in (receiver, *donors)], [1.0] * (1 + len(donors)))
    return Healing(tensors, (), {}, 0, 0)


def refill(model: nn.Module, anatomy: Anatomy, lost: Address, weights: tuple[float, float] = (1.0, 1.0)) -> Healing:
    """New parameters for a block whose own are lost: the weighted mean of the blocks before and behind it. Nothing is
    dropped. The paper weighs by the squared norms of the last gradients of both; the default is the plain mean.

    Source: CheckFree, "a weighted average of the closest neighboring stages"; the first and the last block, which have
    one neighbour, need its CheckFree+, whose training lets neighbours stand in for them, and are refused.
    """
    stack = anatomy.stack(lost.stack)
    if lost.sublayer is not None or not 0 < lost.block < len(stack.blocks) - 1:
        raise InputError(f"{lost} cannot be refilled: that takes a whole block with a block on either side")
    if min(weights) < 0 or sum(weights) == 0:
        raise InputError(f"weights {weights} of the neighbours must not be negative, nor both 0")
    own, *around = (names_in(model, stack.blocks[lost.block + step]) for step in (0, -1, 1))
    if not all(alike(model, own, names) for names in around):
        raise InputError(f"{lost} cannot be refilled: its neighbours are not built like it")
    return Healing(_mean(model, own, around, weights), (), {}, 0, 0)


def _mean(model: nn.Module, own: Names, sources: Sequence[Names], weights: Sequence[float]) -> dict[str, Tensor]:
    new = {}
    for name, path in own.items():
        parts = [w * model.get_parameter(s[name]).detach().float() for s, w in zip(sources, weights, strict=True)]
        new[path] = (sum(parts[1:], parts[0]) / sum(weights)).to(model.get_parameter(path).dtype)
    return new
