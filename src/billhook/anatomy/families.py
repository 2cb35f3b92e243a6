"""The small table: what structure alone cannot tell about a family. Keys are ``config.model_type``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from billhook.anatomy.vocabulary import SHARED_BLOCKS
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

#: How a fused projection of q, k and v is laid out: all of q, then k, then v; or q, k and v of one KV group, then of
#: the next. A fused projection of a family that is not listed is not understood.
FUSED_QKV: dict[str, Literal["stacked", "interleaved"]] = {
    "phi3": "stacked",
    "gpt2": "stacked",
    "modernbert": "stacked",
    "gpt_neox": "interleaved",
    "falcon": "interleaved",
}

#: Families that fuse gate and up into one linear, one above the other.
FUSED_GATE_UP = frozenset({"phi3", "modernbert"})

_ONE_BIAS = "every block's heads read one tensor of position biases, with an entry a head"

#: Families whose heads are tied across blocks.
RIGID_HEADS: dict[str, Callable[[Config], str | None]] = {
    "t5": lambda config: _ONE_BIAS,
    "bloom": lambda config: _ONE_BIAS,
    "falcon": lambda config: _ONE_BIAS if config.alibi else None,
}

#: Families whose config states the width of a head beside their number, or can; and whether it insists that the number
#: divides the hidden size.
HEAD_WIDTH_STATED: dict[str, bool] = {
    **dict.fromkeys(("llama", "gemma2", "gemma3_text"), True),
    **dict.fromkeys(("mistral", "qwen2", "qwen3", "phi3", "olmo2", "granite", "cohere", "smollm3"), False),
    **dict.fromkeys(("mixtral", "qwen3_moe", "deepseek_v3", "vit", "dinov2"), False),
}

#: Config values that an attention looks up while it runs.
LOOKED_UP: dict[str, tuple[str, ...]] = {"phi3": ("num_attention_heads",)}

#: Families whose norms multiply by 1 + weight.
NORMS_FROM_ONE = frozenset({"gemma2", "gemma3_text"})

_MLP_FOLLOWS = "the width of its MLPs follows from hidden_size, with no value of its own in the config"
_HEADS_FOLLOW = "the width of its heads follows from hidden_size, with no value of its own in the config"

#: Why the stream of a family cannot get narrower, where its config states the width of a head or the reason is another.
RIGID_STREAM = {
    "dinov2": _MLP_FOLLOWS,
    "gemma4_text": "every block is given an embedding of its own, made of the stream",
}


def rigid_stream(model_type: str) -> str | None:
    """Why the residual stream of a family cannot get narrower; None where it can."""
    return RIGID_STREAM.get(model_type, None if model_type in HEAD_WIDTH_STATED else _HEADS_FOLLOW)


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
    if getattr(config, SHARED_BLOCKS, None):
        return dict.fromkeys(Target, "its blocks share weights already; cut the model that it was made from")
    if config.model_type not in DECI_SHAPED or not single_decoder:
        return {Target.DECI: f"DeciLM loaders read {', '.join(sorted(DECI_SHAPED))} decoders only"}
    types = getattr(config, "layer_types", None)
    if "sliding_attention" in types if types is not None else getattr(config, "sliding_window", None):
        return {Target.DECI: "DeciLM has no sliding windows"}
    if getattr(config, "mlp_bias", False):
        return {Target.DECI: "DeciLM has no biases in its MLPs"}
    return {}
