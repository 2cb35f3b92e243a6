"""One forward with a KV cache."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor


def cache_name(model: Any) -> str:
    """What a model calls its KV cache: transformers 5.24 renamed ``past_key_values`` to ``cache``, in what a model
    takes and in what it gives."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def forward(model: Any, ids: Tensor, cache: Any = None, **more: Any) -> tuple[Tensor, Any]:
    """The logits of a causal language model for tokens [B, T] that follow what ``cache`` holds, and the cache with them
    in it."""
    name = cache_name(model)
    output = model(input_ids=ids, use_cache=True, **{name: cache}, **more)
    return output.logits, getattr(output, name)
