"""Bias compensation: what removed channels wrote on average, added as a constant."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy.low_rank import matrix
from billhook.anatomy.types import Anatomy
from billhook.data import Windows
from billhook.heal.healing import Healing, require_no_channels
from billhook.heal.refit.reconstruct import removed
from billhook.measure.batches import Batch
from billhook.measure.channels import channels
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.surgery.live import drops_of, keeps_of
from billhook.surgery.narrow import inner_of, kept_entries

Progress = Callable[[str, int, int], None]
OTHER = "its experts see a choice of the tokens, whose mean nobody has taken"


def bias_compensation(
    model: nn.Module,
    anatomy: Anatomy,
    plan: Plan | Iterable[Address],
    source: Windows | Iterable[Batch],
    progress: Progress | None = None,
) -> Healing:
    """Each sublayer that gets narrower writes what its lost channels wrote on average: see ``compensated``.

    Where a write has no bias it gets one, which the config lists; the budget does not count it (one value for each
    channel of the stream). Means are those of the dense model. Cost: one pass. Raises InputError where nothing gets
    narrower.
    """
    require_no_channels(plan, "a bias for what is gone")
    drops_of(plan, anatomy)  # checks it
    keeps = keeps_of(plan, anatomy)
    if not keeps:
        raise InputError("a bias makes up for neurons and groups that went, and this plan makes nothing narrower")
    text = list(source) if not isinstance(source, Windows) else source
    found = channels(model, anatomy, text, progress)
    tensors: dict[str, Tensor] = {}
    left: dict[str, str] = {}
    for keep in keeps:
        inner = inner_of(anatomy, keep)
        for name in dict.fromkeys(piece.parameter for piece in inner.slices if piece.writes):
            if name not in found or inner.kind == "expert":
                left[name] = OTHER
                continue
            linear: Any = model.get_submodule(name.removesuffix(".weight"))
            kept = torch.tensor(kept_entries(inner, keep.indices)[name][1], device=linear.weight.device)
            mean = found[name].mean.to(linear.weight.device)
            old = None if linear.bias is None else linear.bias.detach()
            bias = compensated(mean, matrix(linear), kept, old)
            tensors[f"{name.removesuffix('weight')}bias"] = bias.to(linear.weight.dtype)
    tokens = max(c.count for c in found.values())
    work = tokens * sum(len(stack.blocks) for stack in anatomy.stacks)
    return Healing(tensors, (), left, tokens, work)


def compensated(mean: Tensor, weight: Tensor, kept: Tensor, bias: Tensor | None = None) -> Tensor:
    """The bias [o] of a write that has lost inputs: b + W[:, gone] mean[gone], in float32.

    ``mean`` [n] is the mean of each input of the write over the calibration, ``weight`` [o, n] the write before the
    cut, ``kept`` [k] the inputs that stay. It is the bias that minimises the squared error of the output when nothing
    else changes: what remains is the fluctuation of the lost inputs around their means.

    Source: FLAP (arXiv 2312.11983), section 3.2, baseline bias compensation. Raises InputError for indices that are not
    distinct inputs. Cost: o n.
    """
    gone = removed(kept, weight.shape[1])
    lost = weight[:, gone].float() @ mean[gone].float()
    return lost if bias is None else bias.float() + lost
