"""The names that transformers gives to the parts of a block, and the few ways in which those parts are laid out."""

from __future__ import annotations

from dataclasses import dataclass

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
CROSS_ATTENTION = ("encoder_attn", "crossattention")
MLP = ("mlp", "feed_forward")

#: Further parts of a block that act on the stream itself and stay with the block.
EXTRAS = ("per_layer_input_gate", "per_layer_projection", "post_per_layer_input_norm")

#: Leaf names of the linears that write to the residual stream.
WRITES = frozenset(
    ("o_proj", "out_proj", "dense", "c_proj", "wo", "Wo", "o", "down_proj", "dense_4h_to_h", "fc2", "weights_out", "w2")
)

#: Leaf names of the linears of a gated MLP that no activation follows.
UPS = frozenset(("up_proj", "wi_1"))

#: Leaf names of the linears that make queries alone: without them an attention still makes its keys and values.
QUERIES = frozenset(("q_proj", "q", "q_a_proj"))

#: Leaf names of the linears that make keys or values alone: an attention that reads another's needs none of them.
KEYS_VALUES = frozenset(("k_proj", "v_proj", "k", "v", "kv_a_proj_with_mqa"))

#: How attentions call the cache among their arguments.
CACHES = ("cache", "past_key_values", "layer_past")

#: Arguments of attentions that have a column for each entry of the cache.
BY_ENTRY = ("attention_mask", "alibi")


@dataclass(frozen=True)
class Layout:
    """Which norms and scales stand in which branch of a block.

    ``shared`` ones serve both branches, which then read the stream in parallel. Where a family puts its norms on the
    stream itself (post-norm), the same names belong to no branch; only ``families`` can tell.
    """

    attention: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ()
    cross_attention: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    parallel: bool = False

    @property
    def names(self) -> frozenset[str]:
        return frozenset((*self.attention, *self.mlp, *self.cross_attention, *self.shared))


LAYOUTS = (
    Layout(attention=("input_layernorm",), mlp=("post_attention_layernorm",)),
    Layout(shared=("input_layernorm",), parallel=True),
    Layout(
        attention=("input_layernorm", "post_attention_layernorm"),
        mlp=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    Layout(attention=("post_attention_layernorm",), mlp=("post_feedforward_layernorm",)),
    Layout(attention=("ln_attn",), mlp=("ln_mlp",), parallel=True),
    Layout(attention=("ln_1",), mlp=("ln_2",)),
    Layout(attention=("ln_1",), mlp=("ln_2",), cross_attention=("ln_cross_attn",)),
    Layout(attention=("layernorm_before",), mlp=("layernorm_after",)),
    Layout(attention=("norm1", "layer_scale1"), mlp=("norm2", "layer_scale2")),
    Layout(attention=("layer_norm1",), mlp=("layer_norm2",)),
    Layout(attention=("attn_norm",), mlp=("mlp_norm",)),
    Layout(attention=("self_attn_layer_norm",), mlp=("final_layer_norm",)),
    Layout(
        attention=("self_attn_layer_norm",), mlp=("final_layer_norm",), cross_attention=("encoder_attn_layer_norm",)
    ),
)
NORMS = frozenset(name for layout in LAYOUTS for name in layout.names)

#: Config values that are lists of block numbers, and those that count blocks from the front or from the end.
INDEX_LISTS = ("mlp_only_layers",)
LEADING_COUNTS = ("first_k_dense_replace",)
TRAILING_COUNTS = ("num_kv_shared_layers",)

#: Lists in configs whose length has nothing to do with the number of blocks, whatever it happens to be.
NOT_PER_BLOCK = frozenset(
    (
        *("architectures", "eos_token_id", "bos_token_id", "pad_token_id", "suppress_tokens", "begin_suppress_tokens"),
        *("image_size", "patch_size", "image_mean", "image_std", "keys_to_ignore_at_inference"),
    )
)

#: Leaf names of the linears of an attention that keeps queries, keys and values apart.
APART = (("q_proj", "k_proj", "v_proj"), ("q", "k", "v"), ("query", "key", "value"))

#: Names of the norms of queries and of keys: of one head's width (shared by all heads), or with an entry a head.
QUERY_NORMS, KEY_NORMS = ("q_norm", "q_layernorm"), ("k_norm", "k_layernorm")

#: How modules and configs call their sizes.
HEAD_WIDTH = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
HEADS = ("num_heads", "n_heads", "num_attention_heads")
KV_HEADS = ("num_kv_heads", "num_key_value_heads")
ALL_HEADS = ("split_size", "all_head_size", "inner_dim")
NEURONS = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "d_ff", "n_inner")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")

#: How an attention says that it turns queries and keys by position, where only some of them do.
ROTATES = "use_rope"

#: How an embedding says by how much it is multiplied: the number, and the tensor made of it.
EMBED_SCALE, EMBED_SCALE_TENSOR = "scalar_embed_scale", "embed_scale"

STREAM_WIDTH = ("hidden_size", "hidden_dim", "embed_dim", "embedding_dim")

#: Names of a router, and of parts of a mixture that every token runs through.
ROUTERS = ("gate", "router")
SHARED_EXPERTS = ("shared_experts", "shared_expert", "shared_expert_gate")

#: Names of the weights of fused experts: gate above up in one, or up alone, and down.
GATE_UP, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"

#: Where a config lists blocks that have the weights of an earlier one (see ``surgery.sharing``).
SHARED_BLOCKS = "shared_blocks"
