"""A map of low rank behind a block, which stands for the blocks that are gone after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from billhook.anatomy.low_rank import LowRank
from billhook.plan.errors import InputError

BRIDGE = "bridge"  # its name in the block
BRIDGED = (f"{BRIDGE}.reduce", f"{BRIDGE}.expand")


def build_bridge(block: nn.Module, width: int, rank: int) -> Any:
    """Give a block a bridge for a stream of so many channels, for a file to fill; the handle of its hook."""
    like = next(block.parameters())
    with like.device:
        block.add_module(BRIDGE, LowRank(width, rank, width, False).to(like.dtype))
    return block.register_forward_hook(across, prepend=True)


def require_no_bridges(model: nn.Module, name: str = "the model") -> None:
    """InputError for one that has bridges: what runs parts of a block, or something else in its place, would step
    around them."""
    if any(path.endswith(f".{BRIDGE}") and isinstance(part, LowRank) for path, part in model.named_modules()):
        raise InputError(
            f"{name} has bridges behind blocks, with which it can only be run, or healed further; give the model from "
            f"before"
        )


def across(block: Any, _: Any, output: Any) -> Any:
    """What a block returns, the stream h in it as h + B A h."""
    stream: torch.Tensor = output[0] if isinstance(output, tuple) else output
    stream = stream + block.bridge(stream)
    return (stream, *output[1:]) if isinstance(output, tuple) else stream
