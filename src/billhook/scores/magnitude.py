"""How large the weights of an inner unit are."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from billhook.anatomy import Anatomy
from billhook.measure.width import WidthTrace
from billhook.plan.address import Address
from billhook.scores.registry import score


@score("magnitude", needs="weights")
def magnitude(
    trace: WidthTrace,
    anatomy: Anatomy,
    norm: Literal["l1", "l2"] = "l2",
    of: Literal["reads", "writes", "all"] = "writes",
) -> dict[Address, Tensor]:
    """The sum over the channels of a unit of the ``norm`` of each one's weights ``of`` its writes (a column of down,
    o), its reads (rows of gate, up; q, k, v), or all.

    Source: the Magnitude-SP baseline of FLAP (arXiv 2312.11983, section 4.1), whose code takes the L2 norm of the
    columns of down and o. Cost: one look at the weights.
    """
    order = 1 if norm == "l1" else 2
    found = {}
    for address in trace.units:
        weights = [*(trace.reads(address) if of != "writes" else []), *(trace.writes(address) if of != "reads" else [])]
        found[address] = torch.stack([w.norm(p=order, dim=-1).double().sum(1) for w in weights]).sum(0)
    return found
