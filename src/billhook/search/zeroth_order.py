"""How much each block matters, by forward passes alone, and how sparse it may become."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from billhook.anatomy.linears import linears
from billhook.anatomy.types import Anatomy
from billhook.anatomy.undo import Undo
from billhook.data import Windows
from billhook.heal.healing import put
from billhook.measure.patch import observing

Progress = Callable[[str, int, int], None]
STEP = 1e-3  # of the noise
ROWS, LENGTH = 4, 256  # of the text that is looked at


def zeroth_order(
    model: nn.Module,
    anatomy: Anatomy,
    stack: str,
    windows: Windows,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[dict[int, float], int]:
    """For each block the mean over texts of |L(w + e z) - L(w - e z)| / 2e, and the work in block-token forwards.

    L is the loss on a text, w all linears of the block, z standard normal noise, another one for each text, e = 0.001:
    an estimate of how steep the loss is in the weights of the block, without a gradient. Four pieces of up to 256
    tokens are looked at. Source: ECoFLaP (arXiv 2310.02998), section 3.2, which sums the same figure over the weights
    of a block, drawing noise for one linear at a time, over 32 samples; noise for all at once costs a seventh of that.
    Cost: two passes over 1,024 tokens for each block.
    """
    ids = windows.ids[:ROWS, :LENGTH]
    found, work = {}, 0
    blocks = anatomy.stack(stack).blocks
    for number, block in enumerate(blocks):
        names = [linear.name for sublayer in block.sublayers for linear in linears(model, sublayer, block.path)]
        generator = torch.Generator().manual_seed(seed * len(blocks) + number)
        slopes = []
        for row in ids:
            noise = {n: torch.randn(model.get_parameter(n).shape, generator=generator) for n in names}
            up, down = (_loss(model, row, noise, sign * STEP) for sign in (1, -1))
            slopes.append(abs(up - down) / (2 * STEP))
        found[block.address.block] = math.fsum(slopes) / len(slopes)
        work += 2 * ids.numel() * len(blocks)
        if progress is not None:
            progress("zeroth order", number + 1, len(blocks))
    return found, work


def sparsities(
    importance: Mapping[int, float], sizes: Mapping[int, int], share: float, room: float = 0.1
) -> dict[int, float]:
    """Which share of its weights each block loses, ``share`` of all: none more than ``share + room``, and what is kept
    beyond that in proportion to importance times size, no block keeping more than all.

    Source: ECoFLaP, equations 4 and 5; room 0.1 as its authors take it at a sparsity of one half.
    """
    least = {block: max(0.0, 1 - share - room) * size for block, size in sizes.items()}
    kept, left = dict(least), (1 - share) * sum(sizes.values()) - sum(least.values())
    open_ = {b for b in sizes if importance[b] > 0} or set(sizes)
    while left > 1e-9 * sum(sizes.values()) and open_:
        weight = {b: (importance[b] or 1.0) * sizes[b] for b in open_}
        total = math.fsum(weight.values())
        for block in sorted(open_):
            kept[block] = min(sizes[block], kept[block] + left * weight[block] / total)
        open_ = {b for b in open_ if kept[b] < sizes[b]} or {b for b in sizes if kept[b] < sizes[b]}
        left = (1 - share) * sum(sizes.values()) - math.fsum(kept.values())
    return {block: 1 - kept[block] / sizes[block] for block in sizes}


def _loss(model: nn.Module, row: Tensor, noise: Mapping[str, Tensor], step: float) -> float:
    undo = Undo()
    try:
        for name, z in noise.items():
            old = model.get_parameter(name).detach()
            put(model, name, (old.float() + step * z.to(old.device)).to(old.dtype), undo)
        with observing(model):
            ids = row[None].to(old.device)
            logits = model(input_ids=ids).logits[0, :-1].float()
            return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))
    finally:
        undo.restore()
