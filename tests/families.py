"""A tiny random model of every supported family, built from its config alone. The only tests that name families.

The weights are random well beyond the usual initialisation: every sublayer writes about as much as the residual stream
holds, norms and layer scales are not 1, biases are not 0. A cut that forgets a bias, a scale or a norm shows.

Sizes are chosen to tell numbers apart: two stacks of one model differ in length, and no count of heads, experts or
pixels equals a count of blocks. Windows are shorter than the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import transformers as tf
from torch import Tensor, nn
from transformers import PreTrainedModel

Padding = Literal["left", "right"] | None
VOCABULARY = 101
LENGTH = 9
NO_END = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


@dataclass(frozen=True)
class Family:
    """``build()`` gives a fresh model (eval, float32, always the same weights). ``inputs(model, batch, padding)`` gives
    forward arguments; where ``pads``, row i has 2i padding tokens on the given side. ``stacks`` maps each expected
    stack to its number of blocks. ``tolerance`` is what the dense model itself needs between logits computed with and
    without a KV cache."""

    build: Callable[[], PreTrainedModel]
    inputs: Callable[[PreTrainedModel, int, Padding], dict[str, Tensor]]
    stacks: dict[str, int]
    generates: bool = True
    pads: bool = True
    tolerance: float = 1e-4
    note: str = ""

    def prompt(self, model: PreTrainedModel, batch: int = 1, padding: Padding = None) -> dict[str, Tensor]:
        """The arguments for ``model.generate``: the inputs without those of the decoder of an encoder-decoder."""
        inputs = self.inputs(model, batch, padding)
        return {name: value for name, value in inputs.items() if not name.startswith("decoder_")}


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Draw all weights anew, in place: matrices with gain 1.8 over their fan-in, the rest as noise on what it was."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    transposed = {id(m.weight) for m in model.modules() if type(m).__name__ == "Conv1D"}
    tensors = dict(model.named_parameters()) | {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    seen: set[int] = set()
    with torch.no_grad():
        for tensor in tensors.values():
            if tensor.data_ptr() in seen or tensor.ndim == 0:
                continue
            seen.add(tensor.data_ptr())
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1:
                tensor.mul_(0.8).add_(0.25 * noise)
            elif id(tensor) in embeddings:
                tensor.copy_(noise)
            else:
                fan_in = tensor.shape[0] if id(tensor) in transposed else _fan_in(tensor)
                tensor.copy_(1.8 / fan_in**0.5 * noise)


def _fan_in(tensor: Tensor) -> int:
    """Linear (out, in); stacked experts (experts, out, in); convolution (out, in, kernel...)."""
    return tensor.shape[2] if tensor.ndim == 3 and tensor.shape[2] > 3 else int(tensor[0].numel())


def _built(cls: type[PreTrainedModel], config: Any) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = cls(config())
        randomise(model)
        if hasattr(model.config, "image_token_id"):  # among generated tokens it would ask for an image
            model.generation_config.suppress_tokens = [model.config.image_token_id]
        return model.float().eval()

    return build


def _draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(model: PreTrainedModel, batch: int, padding: Padding, length: int = LENGTH) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY - 8, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(batch if padding else 0):
        blank = slice(0, 2 * row) if padding == "left" else slice(length - 2 * row, length)
        mask[row, blank] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def seq2seq(model: PreTrainedModel, batch: int, padding: Padding) -> dict[str, Tensor]:
    target = tokens(model, batch, None, length=6)["input_ids"].flip(1)
    return tokens(model, batch, padding) | {"decoder_input_ids": target}


def audio(model: PreTrainedModel, batch: int, padding: Padding) -> dict[str, Tensor]:
    target = tokens(model, batch, None, length=6)["input_ids"]
    return {"input_features": _draw((batch, 10, 24), 2), "decoder_input_ids": target}


def pixels(model: PreTrainedModel, batch: int, padding: Padding) -> dict[str, Tensor]:
    return {"pixel_values": _draw((batch, 3, 12, 12), 3)}


def text_and_pixels(model: PreTrainedModel, batch: int, padding: Padding) -> dict[str, Tensor]:
    return tokens(model, batch, padding) | pixels(model, batch, padding)


def text_with_image(model: PreTrainedModel, batch: int, padding: Padding) -> dict[str, Tensor]:
    inputs = tokens(model, batch, padding, length=14)
    image = torch.zeros_like(inputs["input_ids"])
    image[:, 5:9] = 1  # four image tokens, clear of the padding on either side
    ids = torch.where(image.bool(), model.config.image_token_id, inputs["input_ids"])
    return inputs | {"input_ids": ids, "token_type_ids": image} | pixels(model, batch, padding)


def _decoder(cls: str, blocks: int = 5, family: dict[str, Any] | None = None, **settings: Any) -> Family:
    """A causal language model whose config has the usual names; ``settings`` may override any of them."""
    prefix = cls.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        **NO_END,
    }
    names = {"GPT2": "GPT2Config", "Gemma3": "Gemma3TextConfig", "Gemma4": "Gemma4TextConfig"}
    kind = getattr(tf, names.get(prefix, f"{prefix}Config"))
    chosen = {k: v for k, v in (common | settings).items() if v is not _ABSENT}
    return Family(
        build=_built(getattr(tf, cls), lambda: kind(**chosen)),
        inputs=tokens,
        stacks={"decoder": blocks},
        **(family or {}),
    )


_ABSENT: Any = object()
SLIDING, FULL = "sliding_attention", "full_attention"
_GPT_STYLE = {"intermediate_size": _ABSENT, "num_key_value_heads": _ABSENT}
_TEXT_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **NO_END,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 3,
}


def _encoder(
    cls: str, config: type, inputs: Callable[..., dict[str, Tensor]] = tokens, note: str = "", **settings: Any
) -> Family:
    build = _built(getattr(tf, cls), lambda: config(**settings))
    stacks = {"encoder": settings["num_hidden_layers"]}
    return Family(build, inputs, stacks, generates=False, pads=inputs is tokens, note=note)


def _pair(
    cls: str,
    config: type,
    inputs: Callable[..., dict[str, Tensor]],
    settings: dict[str, Any],
    stacks: dict[str, int],
    **fields: Any,
) -> Family:
    return Family(_built(getattr(tf, cls), lambda: config(**settings)), inputs, stacks, **fields)


def _t5(note: str, **settings: Any) -> Family:
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 7, "d_ff": 48, "num_layers": 5, "num_decoder_layers": 4}
    rest = {"num_heads": 3, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
    start = {"pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 0}
    stacks = {"encoder": 5, "decoder": 4}  # the dense model cannot generate with the decoder the deeper one
    return _pair("T5ForConditionalGeneration", tf.T5Config, seq2seq, sizes | rest | start | settings, stacks, note=note)


_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 4,
    "decoder_layers": 5,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **NO_END,
}
_BOTH = {"encoder": 4, "decoder": 5}

FAMILIES: dict[str, Family] = {
    "llama": _decoder(
        "LlamaForCausalLM",
        hidden_size=36,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
        tie_word_embeddings=True,
        family={"note": "head_dim is not hidden_size / heads"},
    ),
    "llama_bias": _decoder("LlamaForCausalLM", attention_bias=True, mlp_bias=True),
    "mistral": _decoder("MistralForCausalLM", sliding_window=4),
    "qwen2": _decoder("Qwen2ForCausalLM", use_sliding_window=True, sliding_window=4, max_window_layers=2),
    "qwen3": _decoder("Qwen3ForCausalLM", head_dim=10),
    "gemma2": _decoder("Gemma2ForCausalLM", head_dim=10, sliding_window=4, query_pre_attn_scalar=12),
    "gemma3": replace(  # its logits reach 9; what differs by 2e-4 in float32 differs by 2e-15 in float64
        _decoder("Gemma3ForCausalLM", blocks=7, head_dim=10, sliding_window=4, query_pre_attn_scalar=12), tolerance=5e-4
    ),
    "phi3": _decoder("Phi3ForCausalLM"),
    "olmo2": _decoder("Olmo2ForCausalLM"),
    "granite": _decoder(
        "GraniteForCausalLM",
        residual_multiplier=0.6,
        attention_multiplier=0.3,
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        mlp_bias=True,
    ),
    "stablelm": _decoder("StableLmForCausalLM", use_qkv_bias=True),
    "stablelm_parallel": _decoder("StableLmForCausalLM", use_parallel_residual=True, qk_layernorm=True),
    "cohere": _decoder("CohereForCausalLM", use_qk_norm=True, logit_scale=0.3),
    "smollm3": _decoder("SmolLM3ForCausalLM", no_rope_layer_interval=3),
    "gpt2": _decoder("GPT2LMHeadModel", **_GPT_STYLE),
    "gpt_neox": _decoder("GPTNeoXForCausalLM", num_key_value_heads=_ABSENT),
    "gpt_neox_sequential": _decoder("GPTNeoXForCausalLM", num_key_value_heads=_ABSENT, use_parallel_residual=False),
    "opt": _decoder("OPTForCausalLM", **_GPT_STYLE, ffn_dim=48),
    "opt_post_norm": _decoder(
        "OPTForCausalLM", **_GPT_STYLE, ffn_dim=48, do_layer_norm_before=False, word_embed_proj_dim=20
    ),
    "falcon": _decoder("FalconForCausalLM", **_GPT_STYLE, family={"note": "parallel, one norm, multi-query"}),
    "falcon_new": _decoder(
        "FalconForCausalLM", **_GPT_STYLE, new_decoder_architecture=True, num_kv_heads=2, bias=True
    ),
    "falcon_alibi": _decoder(
        "FalconForCausalLM", **_GPT_STYLE, alibi=True, parallel_attn=False, multi_query=False, bias=True
    ),
    "bloom": _decoder("BloomForCausalLM", **_GPT_STYLE),
    "bloom_post_norm": _decoder(
        "BloomForCausalLM",
        **_GPT_STYLE,
        apply_residual_connection_post_layernorm=True,
        family={"note": "the residual is taken after the norm"},
    ),
    "mixtral": _decoder("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": _decoder(
        "Qwen3MoeForCausalLM",
        head_dim=10,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        mlp_only_layers=[1, 3],
    ),
    "olmoe": _decoder("OlmoeForCausalLM", num_experts=8, num_experts_per_tok=3, intermediate_size=20),
    "deepseek_v3": _decoder(
        "DeepseekV3ForCausalLM",
        num_key_value_heads=4,
        first_k_dense_replace=1,
        moe_intermediate_size=20,
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=2,
        q_lora_rank=14,
        kv_lora_rank=12,
        qk_rope_head_dim=6,
        qk_nope_head_dim=10,
        v_head_dim=9,
    ),
    "gemma4": _decoder(
        "Gemma4ForCausalLM",
        blocks=7,
        head_dim=8,
        global_head_dim=16,
        sliding_window=4,
        layer_types=[SLIDING, FULL, SLIDING, FULL, SLIDING, SLIDING, FULL],
        num_kv_shared_layers=3,
        hidden_size_per_layer_input=10,
        vocab_size_per_layer_input=VOCABULARY,
        use_double_wide_mlp=True,
        family={"note": "the last three blocks reuse keys and values of earlier ones; a third, gated write per block"},
    ),
    "bert": _encoder("BertForMaskedLM", tf.BertConfig, **_TEXT_ENCODER),
    "bert_classifier": _encoder("BertForSequenceClassification", tf.BertConfig, num_labels=3, **_TEXT_ENCODER),
    "roberta": _encoder("RobertaForMaskedLM", tf.RobertaConfig, **_TEXT_ENCODER),
    "modernbert": _encoder(
        "ModernBertForMaskedLM",
        tf.ModernBertConfig,
        local_attention=6,
        cls_token_id=1,
        sep_token_id=2,
        **_TEXT_ENCODER,
    ),
    "vit": _encoder("ViTForImageClassification", tf.ViTConfig, pixels, num_labels=3, **_VISION),
    "dinov2": _encoder(
        "Dinov2Model", tf.Dinov2Config, pixels, note="layer scales", layerscale_value=0.7, mlp_ratio=2,
        **{k: v for k, v in _VISION.items() if k != "intermediate_size"},
    ),
    "clip": _pair(
        "CLIPModel",
        tf.CLIPConfig,
        text_and_pixels,
        {
            "text_config": {**_TEXT_ENCODER, "projection_dim": 12, "eos_token_id": 2},
            "vision_config": {**_VISION, "projection_dim": 12},
            "projection_dim": 12,
        },
        {"text": 5, "vision": 4},
        generates=False,
    ),
    "t5": _t5("relu", feed_forward_proj="relu"),
    "t5_gated": _t5("gated", feed_forward_proj="gated-gelu"),
    "bart": _pair(
        "BartForConditionalGeneration",
        tf.BartConfig,
        seq2seq,
        _SEQ2SEQ | {"max_position_embeddings": 64},
        _BOTH,
    ),
    "whisper": _pair(
        "WhisperForConditionalGeneration",
        tf.WhisperConfig,
        audio,
        _SEQ2SEQ
        | {"num_mel_bins": 10, "max_source_positions": 12, "max_target_positions": 30, "begin_suppress_tokens": None},
        _BOTH,
        pads=False,
    ),
    "gemma3_image": _pair(
        "Gemma3ForConditionalGeneration",
        tf.Gemma3Config,
        text_with_image,
        {
            "text_config": {
                "vocab_size": VOCABULARY, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 7,
                "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "sliding_window": 5,
                "query_pre_attn_scalar": 12, "max_position_embeddings": 64, **NO_END,
            },
            "vision_config": {"model_type": "siglip_vision_model", **_VISION, "vision_use_head": False},
            "mm_tokens_per_image": 4,
            "image_token_index": VOCABULARY - 1,
            "boi_token_index": VOCABULARY - 2,
            "eoi_token_index": VOCABULARY - 3,
            **NO_END,
        },
        {"vision": 4, "decoder": 7},
    ),
}  # fmt: skip

params = list(FAMILIES)


def build(name: str) -> PreTrainedModel:
    return FAMILIES[name].build()


def unsupported() -> PreTrainedModel:
    """A state-space model: its mixer is neither an attention nor an MLP."""
    config = tf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=6, num_hidden_layers=4, **NO_END)
    return _built(tf.MambaForCausalLM, lambda: config)()


def plain() -> nn.Module:
    """No transformer at all."""
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
