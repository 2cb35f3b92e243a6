"""Attention of one new token over all that came before it, on the processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

_NAME = "sdpa"
_Out = tuple[Tensor, Tensor | None]


@contextmanager
def one_query_at_a_time() -> Iterator[None]:
    """While inside, models that attend by ``sdpa`` take plain products where a row has a single query, no mask and lies
    on the processor: the same but for rounding. torch's kernel for the processor is made for many queries and lays out
    all keys anew for each (64 rows of 256 tokens, 9 heads on 3 of keys, bfloat16: 16 ms against 1)."""
    usual: Any = AttentionInterface()[_NAME]

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **more: Any) -> _Out:
        plain = mask is None and not more.get("dropout") and more.get("position_bias") is None
        if q.shape[2] == 1 and q.device.type == "cpu" and plain and more.get("softcap") is None:
            return _products(q, k, v, more.get("scaling")), None
        found: _Out = usual(module, q, k, v, mask, **more)
        return found

    AttentionInterface.register(_NAME, attend)
    try:
        yield
    finally:
        AttentionInterface.register(_NAME, usual)


def _products(q: Tensor, k: Tensor, v: Tensor, scaling: float | None) -> Tensor:
    """Queries [B, heads, 1, d], keys and values [B, groups, T, d] as [B, 1, heads, d]: heads that share keys are rows
    of one product."""
    rows, heads, _, width = q.shape
    shared = q.reshape(rows, k.shape[1], heads // k.shape[1], width)
    scores = (shared @ k.transpose(-1, -2)).float() * (width**-0.5 if scaling is None else scaling)
    return (scores.softmax(-1).to(v.dtype) @ v).reshape(rows, 1, heads, -1)
