"""Removed neurons rebuilt from kept ones without any data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy.low_rank import as_kept, matrix
from billhook.anatomy.types import Anatomy, Block, Inner, Sublayer
from billhook.heal.healing import Healing, require_no_channels
from billhook.heal.refit.plain_norms import gain_of, read_through
from billhook.heal.refit.reconstruct import gram_of_reads, reconstruction
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.surgery.live import drops_of, keeps_of
from billhook.surgery.narrow import inner_of, kept_entries

Progress = Callable[[str, int, int], None]
PENALTY = 0.1  # relative to the mean energy of a channel: what the weights alone say of the inputs is a guess
HEADS = "without data nothing is known of what attention mixes"
FUSED = "its neurons are not those of one or two linears with a row each"


def data_free(
    model: nn.Module,
    anatomy: Anatomy,
    plan: Plan | Iterable[Address],
    source: object = None,
    progress: Progress | None = None,
) -> Healing:
    """Neurons that go are rebuilt from those that stay, by what the weights of the reads alone suggest of how they go
    together, and the write takes that up: ``reconstruction`` on ``gram_of_reads``.

    What the norm before the reads multiplies with is folded into them. Activation functions, biases and what the stream
    looks like (a norm that stands on it included) are left out: that is the price of asking for no data, and it can
    harm; ``source`` is not looked at. Source: UDFC (arXiv 2308.07209), section 3, where every removed channel is a
    combination of the kept ones. Cost: k^3 / 3 for k kept neurons. Raises InputError where no MLP gets narrower.
    """
    require_no_channels(plan, "healing without data")
    drops_of(plan, anatomy)  # checks it
    keeps = keeps_of(plan, anatomy)
    if not any(keep.inner == "neuron" for keep in keeps):
        raise InputError("healing without data rebuilds neurons that went, and this plan takes none away")
    tensors: dict[str, Tensor] = {}
    left: dict[str, str] = {}
    for number, keep in enumerate(keeps, start=1):
        sublayer, inner = anatomy.sublayer(keep.unit), inner_of(anatomy, keep)
        write = sublayer.writes[0]
        reads = _reads(model, anatomy.block(keep.unit), sublayer, inner)
        if inner.kind != "neuron" or not 1 <= len(reads) <= 2:
            left[write] = FUSED if inner.kind == "neuron" else HEADS
            continue
        linear: Any = model.get_submodule(write.removesuffix(".weight"))
        axis, entries = kept_entries(inner, keep.indices)[write]
        kept = torch.tensor(entries, device=linear.weight.device)
        new = reconstruction(gram_of_reads(*reads), matrix(linear), kept, PENALTY).to(linear.weight.dtype)
        whole = linear.weight.detach().clone()
        tensors[write] = whole.index_copy_(axis, kept, as_kept(linear, new))
        if progress is not None:
            progress("healing without data", number, len(keeps))
    return Healing(tensors, (), left, 0, 0)


def _reads(model: nn.Module, block: Block, sublayer: Sublayer, inner: Inner) -> list[Tensor]:
    """One row a neuron for each linear that it reads through, in float32, with the gain of the norm before."""
    path = read_through(block, sublayer)
    gain = None if path is None else gain_of(model.get_submodule(path))
    found = []
    for piece in inner.slices:
        owner: Any = model.get_submodule(piece.parameter.rpartition(".")[0])
        weight = getattr(owner, "weight", None)
        if piece.writes or not piece.parameter.endswith(".weight") or weight is None or weight.ndim != 2:
            continue
        rows = matrix(owner)[piece.start : piece.start + inner.count].float()
        if gain is not None and gain.shape == rows.shape[1:]:
            rows = rows * gain
        found.append(rows)
    return found
