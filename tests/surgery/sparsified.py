"""What the tests of sparsity share: random masks for any sublayer."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from torch import nn

from billhook.anatomy import Anatomy
from billhook.anatomy.linears import linears
from billhook.plan.address import Address
from billhook.plan.arrays import Arrays
from billhook.plan.masks import pack
from billhook.plan.plan import Keep, Plan, Sparsify
from billhook.plan.target import Target


def sparse(
    model: nn.Module,
    anatomy: Anatomy,
    seed: int,
    gone: Collection[Address] = (),
    keeps: Collection[Keep] = (),
    target: Target = Target.ANY,
) -> Plan:
    """A plan that sets about half of the weights of every sublayer to zero that is not ``gone``."""
    rng = np.random.default_rng(seed)
    edits, arrays = [], {}
    for stack in anatomy.stacks:
        for block in stack.blocks:
            for sublayer in block.sublayers:
                if sublayer.address in gone or block.address in gone:
                    continue
                zeros = {}
                for linear in linears(model, sublayer, block.path):
                    mask = rng.random(tuple(model.get_parameter(linear.name).shape)) < 0.5
                    zeros[linear.inside] = int((~mask).sum())
                    arrays[f"{sublayer.address}/{linear.inside}"] = pack(mask)
                edits.append(Sparsify(unit=sublayer.address, zeros=zeros))
    return Plan.of(gone, target, keeps, edits, Arrays(arrays))
