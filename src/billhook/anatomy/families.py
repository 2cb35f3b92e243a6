"""The small table: what structure alone cannot tell about a family. Keys are ``config.model_type``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from billhook.plan.target import Target

Config = Any

#: Families that use the layout of ``self_attn_layer_norm``/``final_layer_norm`` or of Bloom, where the same names can
#: mean norms in the branches (pre-norm, False) or on the stream itself (post-norm, True).
POST_NORM: dict[str, Callable[[Config], bool]] = {
    "bart": lambda config: True,
    "opt": lambda config: not config.do_layer_norm_before,
    "whisper": lambda config: False,
    "bloom": lambda config: bool(config.apply_residual_connection_post_layernorm),
}

#: Families whose blocks all look alike from outside although their forward pass depends on the block's number.
REFUSED: dict[str, Callable[[Config], str | None]] = {
    "gpt2": lambda config: (
        "scale_attn_by_inverse_layer_idx makes every attention depend on its block's number"
        if config.scale_attn_by_inverse_layer_idx
        else None
    ),
}

_SHARED_BIAS = "it holds the relative position bias that every later block reads"
_FIRST_NORM = "the first block has no attention norm, so no other block can take its place"

#: What must stay, and why: stack-relative addresses ("0", "0.attention") per stack name.
PINNED: dict[str, dict[str, str]] = {
    "t5": {"0": _SHARED_BIAS, "0.attention": _SHARED_BIAS},
    "modernbert": {"0": _FIRST_NORM},
}

#: Stacks that must not get shorter than another one: transformers sizes T5's decoder cache by the encoder's blocks.
NOT_SHORTER: dict[str, dict[str, str]] = {"t5": {"encoder": "decoder"}}

#: Families whose weights a DeciLM loader (vLLM, llama.cpp) can read under their own names.
DECI_SHAPED = frozenset({"llama", "mistral", "qwen2"})


def ambiguous_norms(model_type: str, names: frozenset[str]) -> bool:
    """Whether norms of these names mean different things in different families."""
    return "self_attn_layer_norm" in names and model_type not in POST_NORM


def post_norm(config: Config) -> bool:
    rule = POST_NORM.get(config.model_type)
    return rule(config) if rule else False


def refusal(config: Config) -> str | None:
    rule = REFUSED.get(config.model_type)
    return rule(config) if rule else None


def refused_targets(config: Config, single_decoder: bool) -> dict[Target, str]:
    """Targets that no plan for this family can have, with the reason."""
    if config.model_type not in DECI_SHAPED or not single_decoder:
        return {Target.DECI: f"DeciLM loaders read {', '.join(sorted(DECI_SHAPED))} decoders only"}
    types = getattr(config, "layer_types", None)
    if "sliding_attention" in types if types is not None else getattr(config, "sliding_window", None):
        return {Target.DECI: "DeciLM has no sliding windows"}
    if getattr(config, "mlp_bias", False):
        return {Target.DECI: "DeciLM has no biases in its MLPs"}
    return {}
