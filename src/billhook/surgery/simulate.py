"""A plan tried out on the live model, without copying a weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from billhook.anatomy import Anatomy
from billhook.anatomy.undo import Undo
from billhook.plan.address import Address
from billhook.plan.plan import Plan
from billhook.surgery.factorise import factors_of
from billhook.surgery.live import channels_of, cut, drops_of, keeps_of, orders_of
from billhook.surgery.low_rank_experts import mixtures_of
from billhook.surgery.masks import masks_of


@contextmanager
def simulate(model: nn.Module, anatomy: Anatomy, plan: Plan | Iterable[Address]) -> Iterator[nn.Module]:
    """Inside the context ``model`` is the compressed model; leaving it, also by an exception, restores it exactly.

    Works in place by swapping modules, narrower tensors and config values. Costs next to no time, and no memory but for
    what stays of tensors that get narrower (with a narrower stream that is the whole smaller model), a copy of those
    that lose single weights, and linears that become two.
    Raises InputError if the plan is not possible on this model; the model is untouched then.
    """
    drops, masks, factors = drops_of(plan, anatomy), masks_of(plan, anatomy, model), factors_of(plan, anatomy)
    orders, mixtures = orders_of(plan, anatomy), mixtures_of(plan, anatomy)
    thinner = channels_of(plan, anatomy)
    undo = Undo()
    undo.guard_hooks(model)
    try:
        cut(model, anatomy, drops, keeps_of(plan, anatomy), masks, undo, orders, factors, thinner, mixtures)
        yield model
    finally:
        undo.restore()
