"""What is fed to a model while it is being watched: keyword arguments of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from billhook.data import Windows
from billhook.plan.errors import InputError

Batch = Mapping[str, Any]
TOKENS_AT_ONCE = 2048


def batches_of(
    source: Windows | Iterable[Batch], model: nn.Module, tokens_at_once: int = TOKENS_AT_ONCE
) -> Iterator[dict[str, Any]]:
    """Batches on the model's device, with the cache switched off where the model has one.

    Windows are grouped to about ``tokens_at_once`` tokens; an encoder-decoder reads them on both sides, its decoder
    with the shift that it is trained with. Batches of other inputs are taken as they come.
    Causal models that take ``position_ids`` get them counted from the first real token of each row, so that
    left-padded rows see the positions they would have alone.
    """
    accepted = inspect.signature(model.forward).parameters
    device = next(model.parameters()).device
    for batch in _grouped(source, model, tokens_at_once):
        inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        if "use_cache" in accepted:
            inputs["use_cache"] = False
        mask = inputs.get("attention_mask")
        if mask is not None and "position_ids" in accepted and "position_ids" not in inputs and not mask.all():
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        yield inputs


def _grouped(source: Windows | Iterable[Batch], model: Any, tokens_at_once: int) -> Iterable[Batch]:
    if not isinstance(source, Windows):
        return source
    pieces = torch.split(source.ids, max(1, tokens_at_once // source.ids.shape[1]))
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return [{"input_ids": ids} for ids in pieces]
    shifted = model.prepare_decoder_input_ids_from_labels
    return [{"input_ids": ids, "decoder_input_ids": shifted(ids)} for ids in pieces]


def for_the_head(model: Any, ids: Tensor) -> dict[str, Any]:
    """Inputs [c] of a forward in which every block hands on, so that no cache is filled and no router is reached."""
    inputs: dict[str, Any] = {"input_ids": ids[None]}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        inputs["output_router_logits"] = False
    return inputs


def real_tokens(inputs: Batch, stack: str, stream: Tensor) -> Tensor:
    """Which positions of a stack's stream [batch, tokens, hidden] are not padding: bool [batch, tokens].

    Images and audio have none; a decoder beside an encoder has a mask of its own.
    """
    shape = stream.shape[:2]
    key = "decoder_attention_mask" if stack == "decoder" and "decoder_input_ids" in inputs else "attention_mask"
    unpadded = stack == "vision" or (stack == "encoder" and "input_features" in inputs)
    mask: Tensor | None = None if unpadded else inputs.get(key)
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=stream.device)
    if mask.shape != shape:
        raise InputError(f"{key} has shape {tuple(mask.shape)}; the stream of {stack} needs {tuple(shape)}")
    return mask.bool()
