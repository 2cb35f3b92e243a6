"""How much attention maps hold: their rank, block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.anatomy.undo import Undo, frozen
from billhook.plan.errors import InputError

SEQUENCES = 16
TOLERANCE = 0.01
"""Singular values below this share of the largest one are taken for nothing."""


def attention_ranks(model: PreTrainedModel, batches: Sequence[Mapping[str, Any]]) -> list[float]:
    """ARank of each block of the decoder: the rank of the map [tokens, tokens] by which a head mixes its tokens, the
    mean over heads and over the first ``SEQUENCES`` sequences of the batches. A low one says that most tokens are read
    in the same way, so that few of them need the block.

    ``batches`` are arguments of the model's forward; padding counts for nothing. Source: γ-MoD (arXiv 2410.13859),
    which names the layers to convert by it. Chosen here: what is taken for rank. A causal map has its whole diagonal
    above zero and so, exactly, full rank; counted are the singular values above ``TOLERANCE`` of the largest.
    Cost: a forward pass with attention maps kept (blocks x heads x tokens^2), and as many singular value
    decompositions. InputError where a model does not give its maps, as an
    encoder-decoder, which has two kinds, does not.
    """
    sums: Tensor | None = None
    seen = 0
    undo = Undo()
    undo.guard_hooks(model)
    _eagerly(model, undo)
    try:
        with frozen(model), torch.no_grad():
            for batch in batches:
                if seen >= SEQUENCES:
                    break
                some = {name: value[: SEQUENCES - seen] for name, value in batch.items()}
                output = model(**some, use_cache=False, output_attentions=True)
                maps = output.get("attentions")
                if not maps or any(each is None for each in maps):
                    raise InputError("attention ranks cannot be measured: the model does not give its attention maps")
                real = some.get("attention_mask")
                ranks = torch.stack([_ranks(each.float(), real).sum() / each.shape[1] for each in maps]).cpu()
                sums = ranks if sums is None else sums + ranks
                seen += maps[0].shape[0]
    finally:
        undo.restore()
    if sums is None:
        raise InputError("attention ranks need text or other input to be measured on; there is none")
    return [float(rank) for rank in sums / seen]


def _ranks(maps: Tensor, real: Tensor | None) -> Tensor:
    """[rows, heads] of maps [rows, heads, tokens, tokens]."""
    if real is not None:
        maps = maps * (real[:, None, :, None] * real[:, None, None, :])
    values = torch.linalg.svdvals(maps)
    found: Tensor = (values > TOLERANCE * values[..., :1]).sum(-1).float()
    return found


def _eagerly(model: PreTrainedModel, undo: Undo) -> None:
    """Let every attention compute its map for all to see."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for config in configs.values():
        undo.set(config, "_attn_implementation_internal", "eager")  # of this config alone, and not of its parts
