"""What is timed: a prefill, or a decode on a filled cache."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.data.decoding import forward
from billhook.evaluate.causal import positions, vocabulary
from billhook.measure.latency import Timed
from billhook.plan.record import Workload

PREFILL = Workload(name="prefill", batch=1, prompt_tokens=512, new_tokens=0)
DECODE_1 = Workload(name="decode, batch 1", batch=1, prompt_tokens=128, new_tokens=16)
DECODE_8 = Workload(name="decode, batch 8", batch=8, prompt_tokens=128, new_tokens=16)
DEFAULT = (PREFILL, DECODE_1, DECODE_8)


def fitting(model: PreTrainedModel) -> tuple[Workload, ...]:
    """The default workloads, their prompts cut to the positions that the model has."""
    limit = positions(model)
    if limit is None:
        return DEFAULT
    return tuple(w.model_copy(update={"prompt_tokens": min(w.prompt_tokens, limit - w.new_tokens)}) for w in DEFAULT)


def prompt_ids(workload: Workload, model: PreTrainedModel) -> Tensor:
    """Random ordinary tokens [batch, prompt_tokens], the same in every run.

    Not those that the config gives a meaning (end of sequence, a place for an image).
    """
    settings = model.config.to_dict().items()
    special = {value for name, value in settings if name.endswith(("_token_id", "_token_index"))}
    ordinary = torch.tensor([i for i in range(vocabulary(model)) if i not in special])
    generator = torch.Generator().manual_seed(0)
    return ordinary[torch.randint(len(ordinary), (workload.batch, workload.prompt_tokens), generator=generator)]


def prefill(model: PreTrainedModel, ids: Tensor) -> tuple[Any, Tensor]:
    """Read a prompt [B, T] at once, as generation does: the filled cache, and the likeliest next tokens [B, 1].

    Only the last position goes through the head, where the model's forward has ``logits_to_keep``.
    """
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits, cache = forward(model, ids, **last)
    return cache, logits[:, -1:].argmax(-1)


def decode(model: PreTrainedModel, cache: Any, token: Tensor, steps: int) -> Tensor:
    """Exactly ``steps`` greedy single-token steps on a cache, which grows; returns the tokens [B, steps].

    An end-of-sequence token ends nothing: both models always do the same number of steps.
    """
    tokens = []
    for _ in range(steps):
        logits, cache = forward(model, token, cache)
        token = logits[:, -1:].argmax(-1)
        tokens.append(token)
    return torch.cat(tokens, dim=1)


def ready(model: PreTrainedModel, workload: Workload, ids: Tensor) -> Callable[[], Timed]:
    """The workload in the form that ``measure.latency.interleaved`` takes.

    A decode is timed without its prefill: every round starts on a copy of one filled cache.
    """
    ids = ids.to(model.device)
    if workload.new_tokens == 0:
        return lambda: lambda: prefill(model, ids)
    cache, token = prefill(model, ids)

    def prepare() -> Timed:
        own = copy.deepcopy(cache)
        return lambda: decode(model, own, token, workload.new_tokens)

    return prepare
