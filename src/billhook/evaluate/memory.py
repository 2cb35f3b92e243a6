"""Memory that a workload really takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.evaluate.workload import decode, prefill
from billhook.plan.record import Workload


def memory_of(model: PreTrainedModel, workload: Workload, ids: Tensor) -> tuple[int | None, int]:
    """Peak bytes and bytes of the cache at the end of one whole run, prefill included.

    The peak is the model's own weights plus the highest allocation during the run above what was there before, summed
    over the devices that it lies on; weights of other models beside it do not count. Only CUDA keeps such a count:
    None elsewhere. The cache is what its tensors keep alive.
    """
    devices = {p.device for p in model.parameters()}
    counted = all(device.type == "cuda" for device in devices)
    before = {}
    if counted:
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
            before[device] = torch.cuda.memory_allocated(device)
    cache, token = prefill(model, ids.to(model.device))
    if workload.new_tokens:
        decode(model, cache, token, workload.new_tokens)
    peak = None
    if counted:
        above = sum(torch.cuda.max_memory_allocated(device) - before[device] for device in devices)
        peak = above + tensor_bytes([*model.parameters(), *model.buffers()])
    return peak, tensor_bytes(cache)


def tensor_bytes(thing: Any) -> int:
    """Memory that an object's tensors keep alive, shared storage counted once: what a cache really costs."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(thing, set())}
    return sum(storages.values())


def _tensors(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if hasattr(thing, "__tensor_flatten__"):  # a tensor made of others, such as a sparse weight
        for name in thing.__tensor_flatten__()[0]:
            yield from _tensors(getattr(thing, name), seen)
    elif isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from _tensors(value, seen)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            yield from _tensors(value, seen)
    elif hasattr(thing, "__dict__"):
        yield from _tensors(vars(thing), seen)
