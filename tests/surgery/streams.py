"""What the tests of narrower streams share: random channels, and the channels that go taken for zeros."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy import Anatomy
from billhook.plan.plan import HiddenChannels


def some_channels(anatomy: Anatomy, seed: int, share: float = 0.7) -> HiddenChannels:
    """Random channels of the one stream, about as many as asked for."""
    (residual,) = anatomy.residuals.values()
    left = max(int(share * residual.count) // residual.multiple, 1) * residual.multiple
    indices = sorted(random.Random(seed).sample(range(residual.count), left))
    return HiddenChannels(stack=residual.stack, indices=tuple(indices))


@contextmanager
def zeroed(model: nn.Module, anatomy: Anatomy, edit: HiddenChannels) -> Iterator[None]:
    """Whatever writes to the stream writes zeros to the channels that go; norms that subtract a mean take that of the
    channels that stay."""
    gone = sorted(set(range(anatomy.residuals[edit.stack].count)) - set(edit.indices))
    state = dict(model.named_parameters())
    norms = [block.norms for block in anatomy.stack(edit.stack).blocks]
    norms += [part.norms for block in anatomy.stack(edit.stack).blocks for part in block.sublayers]
    paths = [path for group in norms for path in group] + [anatomy.stack(edit.stack).final_norm]
    writes = {name for block in anatomy.stack(edit.stack).blocks for part in block.sublayers for name in part.writes}
    writes |= {f"{name.removesuffix('.weight')}.bias" for name in writes}
    inside = anatomy.stack(edit.stack).path
    outside = {name for name in state if not name.startswith((f"{inside}.", *(f"{p}." for p in paths)))}
    heads = {f"{anatomy.head}.weight", "classifier.weight", "classifier.bias"}
    saved: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for name in (writes | outside - heads) & state.keys():
                saved[name] = state[name].clone()
                axis = state[name].ndim - 2 if name in writes and state[name].ndim > 1 else -1
                if "projection.weight" in name:  # a convolution that makes patches
                    axis = 0
                state[name].index_fill_(axis, torch.tensor(gone), 0.0)
        for path in paths:
            norm: Any = model.get_submodule(str(path))
            if "LayerNorm" in type(norm).__name__:
                norm.forward = _over(norm, torch.tensor(edit.indices))
        yield
    finally:
        with torch.no_grad():
            for name, value in saved.items():
                state[name].copy_(value)
        for path in paths:
            vars(model.get_submodule(str(path))).pop("forward", None)


def _over(norm: Any, kept: Tensor) -> Any:
    def forward(x: Tensor) -> Tensor:
        stays = x[..., kept] - x[..., kept].mean(-1, keepdim=True)
        scale = (stays.square().sum(-1, keepdim=True) / x.shape[-1]).sqrt()
        out = torch.zeros_like(x)
        out[..., kept] = stays / scale * norm.weight[kept]
        if getattr(norm, "bias", None) is not None:
            out[..., kept] += norm.bias[kept]
        return out

    return forward
