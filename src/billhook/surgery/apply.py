"""A plan carried out: a smaller model."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

from torch import nn

from billhook.anatomy import Anatomy
from billhook.anatomy.undo import Undo
from billhook.plan.address import Address
from billhook.plan.plan import Plan
from billhook.surgery.factorise import factors_of
from billhook.surgery.live import channels_of, cut, drops_of, keeps_of, orders_of
from billhook.surgery.low_rank_experts import mixtures_of
from billhook.surgery.masks import masks_of

Model = TypeVar("Model", bound=nn.Module)


def apply(model: Model, anatomy: Anatomy, plan: Plan | Iterable[Address]) -> Model:
    """A compressed model that shares the weights it keeps with ``model``, which stays as it is.

    Nothing is copied but the module tree, the config, of tensors that get narrower what is left of them, those that
    lose single weights, and linears that become two; ``del model`` frees what was cut. Raises InputError if the plan is
    not possible on this model.
    """
    drops, masks, factors = drops_of(plan, anatomy), masks_of(plan, anatomy, model), factors_of(plan, anatomy)
    orders, mixtures = orders_of(plan, anatomy), mixtures_of(plan, anatomy)
    thinner = channels_of(plan, anatomy)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo=dict(shared))
    cut(twin, anatomy, drops, keeps_of(plan, anatomy), masks, Undo(), orders, factors, thinner, mixtures)
    return twin
