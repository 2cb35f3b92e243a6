"""Which models can be evaluated as language models."""

from __future__ import annotations

from transformers import PreTrainedModel

from billhook.plan.errors import InputError


def require_causal(model: PreTrainedModel, purpose: str) -> None:
    """Raise InputError unless the model predicts the next token from those before it."""
    reason = None
    if model.config.is_encoder_decoder:
        reason = "is an encoder-decoder"
    elif not model.can_generate():
        reason = "does not predict the next token (an encoder, a masked language model, or a model without its head)"
    elif model.get_output_embeddings() is None:
        reason = "has no output head"
    if reason:
        raise InputError(f"{purpose} needs a causal language model: {type(model).__name__} {reason}")


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens the model can tell apart by place; None where its config names no limit."""
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found


def vocabulary(model: PreTrainedModel) -> int:
    """Number of logits per token."""
    return int(model.get_output_embeddings().weight.shape[0])
