"""A model's own logits, a few positions at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from billhook.data.decoding import cache_name
from billhook.measure.patch import hooked, overridden


def logits_by_slice(model: PreTrainedModel, ids: Tensor, cache: Any = None) -> Callable[[slice], Tensor]:
    """Run the trunk once over ``ids`` [B, T], which follow what ``cache`` holds and are put into it; the result gives
    the logits [B, t, V] of a slice of positions.

    Each slice is computed by the model's own forward with the trunk's output handed to it and the head's input cut to
    the slice, so whatever the model does between the trunk and the head or after it (scaling, soft-capping) is done.
    Memory: the trunk's last hidden state, and t × V values while a slice is in use. Cost: one trunk, and one head per
    position asked for.
    """
    trunk, head = model.get_decoder(), model.get_output_embeddings()
    outputs: list[Any] = []
    kept: dict[str, Any] = {"use_cache": False} if cache is None else {"use_cache": True, cache_name(model): cache}

    def logits(positions: slice) -> Tensor:
        cut = head.register_forward_pre_hook(lambda _, args: (args[0][:, positions], *args[1:]))
        try:
            result: Tensor = model(ids, **kept).logits
        finally:
            cut.remove()
        return result

    with hooked([(trunk, lambda _module, _args, _kwargs, output: outputs.append(output))]):
        logits(slice(0))
    if len(outputs) != 1:
        raise RuntimeError(f"{type(model).__name__} ran its decoder {len(outputs)} times in one forward, not once")

    def at(positions: slice) -> Tensor:
        with overridden([(trunk, lambda *_args, **_kwargs: outputs[0])]):
            return logits(positions)

    return at
