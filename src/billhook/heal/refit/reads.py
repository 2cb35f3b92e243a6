"""The reads of a sublayer as one: a linear map of what they are given, folded into all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy.low_rank import is_conv
from billhook.anatomy.types import Sublayer


def reads_of(model: nn.Module, sublayer: Sublayer) -> dict[str, nn.Module]:
    """The linears through which a sublayer reads, by the names of their weights; none where some are no modules of
    their own (fused experts) or read another stream beside this one (cross-attention)."""
    if sublayer.kind == "cross_attention" or any(not name.endswith(".weight") for name in sublayer.reads):
        return {}
    return {name: model.get_submodule(name.removesuffix(".weight")) for name in sublayer.reads}


def folded(reads: dict[str, nn.Module], change: Tensor, whole: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """New weights by name. The reads W are given x; with D [hidden, hidden] such that x D is the best guess of what x
    lacks, W reads (x + x D) from now on. Where x has some of the channels only, D is [some, hidden], and ``whole`` has
    the weights over all of them."""
    new = {}
    for name, linear in reads.items():
        old: Any = linear.weight
        weight = (whole or {}).get(name, old.detach()).float()
        more = change @ weight if is_conv(linear) else weight @ change.T
        new[name] = (old.detach().float() + more).to(old.dtype)
    return new


def same_inputs(given: dict[str, list[Tensor]]) -> list[Tensor] | None:
    """What the reads of a sublayer were given, batch by batch; None unless all were given the same, once a batch."""
    first, *others = given.values()
    same = all(len(other) == len(first) and all(map(torch.equal, first, other)) for other in others)
    return first if same else None
