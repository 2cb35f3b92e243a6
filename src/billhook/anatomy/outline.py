"""The anatomy in numbers: counts of parameters and inner sizes, read off the live modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from billhook.anatomy.bridge import BRIDGE
from billhook.anatomy.config import hidden_size, owner_of
from billhook.anatomy.families import NOT_SHORTER
from billhook.anatomy.linears import linears
from billhook.anatomy.low_rank import LowRank, is_conv, uses
from billhook.anatomy.low_rank import linears as separable
from billhook.anatomy.low_rank_experts import LowRankExperts, mixtures
from billhook.anatomy.types import Block, Stack, Sublayer
from billhook.plan.outline import BlockOutline, Outline, StackOutline, SublayerOutline
from billhook.plan.target import Target


def draw(
    model: PreTrainedModel, stacks: tuple[Stack, ...], pinned: dict[str, str], refused: dict[Target, str]
) -> Outline:
    """Count everything once. Cost: a walk over the parameter list, no arithmetic on weights."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    drawn = tuple(_stack(model, stack, sizes) for stack in stacks)
    in_blocks = sum(block.params for stack in drawn for block in stack.blocks)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    dtypes = [(p.numel(), p.element_size()) for p in model.parameters()]
    return Outline(
        family=model.config.model_type,
        stacks=drawn,
        other_params=sum(sizes.values()) - in_blocks,
        head_params=sum(p.numel() for p in head.parameters()) if head is not None else 0,
        bytes_per_param=sum(n * size for n, size in dtypes) / sum(n for n, _ in dtypes),
        refused=refused,
        pinned=pinned,
        not_shorter=NOT_SHORTER.get(model.config.model_type, {}),
    )


def _stack(model: PreTrainedModel, stack: Stack, sizes: dict[str, int]) -> StackOutline:
    config = owner_of(model, stack.path)[1].config
    held = uses(model)
    blocks = tuple(_block(model, block, stack.causal, config, sizes, held) for block in stack.blocks)
    return StackOutline(name=stack.name, hidden_size=hidden_size(config), causal=stack.causal, blocks=blocks)


def _block(
    model: PreTrainedModel, block: Block, causal: bool, config: Any, sizes: dict[str, int], held: Counter[int]
) -> BlockOutline:
    whole = _count(sizes, [block.path])
    drawn = {}
    for part in block.sublayers:
        weights = sum(sizes.get(linear.name, 0) for linear in linears(model, part, block.path))
        apart = separable(model, part, block.path, held)
        outline = _sublayer(model, part, causal, config, sizes)
        more = {"linear_params": weights, "linears": apart, "mixtures": mixtures(model, part, block.path)}
        drawn[part.kind] = outline.model_copy(update=more)
    rest = whole - sum(s.params for s in drawn.values())
    return BlockOutline(sublayers=drawn, rest_params=rest, bridge_params=_count(sizes, [f"{block.path}.{BRIDGE}"]))


def _sublayer(
    model: PreTrainedModel, sublayer: Sublayer, causal: bool, config: Any, sizes: dict[str, int]
) -> SublayerOutline:
    params = _count(sizes, [cut.path for cut in sublayer.cuts])
    module = model.get_submodule(sublayer.module)
    if sublayer.kind == "mlp":
        return _mlp(model, sublayer, module, params, config, sizes)
    heads, kv_heads, head_dim = _heads(module, config)
    modes = getattr(config, "kv_sharing_modes", None)
    borrows = modes is not None and modes[sublayer.address.block] == "reuse"  # keeps no keys and values of its own
    cached = (causal or sublayer.kind == "cross_attention") and not borrows
    return SublayerOutline(
        params=params,
        active_params=params,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        window=_window(sublayer, config),
        cache_width=_cache_width(config, kv_heads, head_dim) if cached else 0,
    )


def _mlp(
    model: PreTrainedModel, sublayer: Sublayer, module: nn.Module, params: int, config: Any, sizes: dict[str, int]
) -> SublayerOutline:
    experts, active, expert_params = 0, 0, 0
    for name, child in module.named_modules():
        if name.rpartition(".")[2] == "experts":
            expert_params = _count(sizes, [f"{sublayer.module}.{name}"])
            first = next(child.parameters())
            experts = first.shape[0] if first.ndim == 3 else len(list(child.children()))
            active = int(config.num_experts_per_tok)
    write = model.get_parameter(sublayer.writes[0])
    path = sublayer.writes[0].rpartition(".")[0]
    owner = model.get_submodule(path)
    neurons = write.shape[0] if is_conv(owner) else write.shape[-1]
    whole = model.get_submodule(path.rpartition(".")[0])
    if isinstance(whole, LowRank):
        neurons = whole.reduce.in_features
    elif isinstance(owner, LowRankExperts):
        neurons = owner.neurons
    idle = expert_params * (experts - active) // experts if experts else 0
    return SublayerOutline(
        params=params, active_params=params - idle, neurons=neurons, experts=experts, active_experts=active
    )


def _heads(module: Any, config: Any) -> tuple[int, int, int]:
    """Query heads, key-value heads and head width, from the module where it says so, else from the config."""
    inner = _attention_core(module)
    heads = _first(inner, config, ("num_heads", "n_heads", "num_attention_heads"))
    head_dim = _first(inner, config, ("head_dim", "qk_head_dim", "attention_head_size", "key_value_proj_dim"))
    head_dim = head_dim or config.hidden_size // heads
    if hasattr(inner, "k_proj"):
        return inner.q_proj.weight.shape[0] // head_dim, inner.k_proj.weight.shape[0] // head_dim, head_dim
    if getattr(inner, "new_decoder_architecture", False):
        return heads, heads, head_dim  # keys and values are broadcast to all heads before they are cached
    kv_heads = _first(inner, config, ("num_kv_heads", "num_key_value_heads")) or heads
    return heads, kv_heads, head_dim


def _attention_core(module: Any) -> Any:
    for name in ("SelfAttention", "EncDecAttention"):
        if hasattr(module, name):
            return getattr(module, name)
    return module


def _first(module: Any, config: Any, names: Iterable[str]) -> int:
    names = tuple(names)
    for source in (module, config):
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return 0


def _window(sublayer: Sublayer, config: Any) -> int | None:
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[sublayer.address.block] != "sliding_attention":
        return None
    window = getattr(config, "sliding_window", None)
    return int(window) if isinstance(window, int) else None


def _cache_width(config: Any, kv_heads: int, head_dim: int) -> int:
    latent = getattr(config, "kv_lora_rank", None)
    if latent:
        return int(latent + config.qk_rope_head_dim)
    return 2 * kv_heads * head_dim


def _count(sizes: dict[str, int], prefixes: Iterable[str]) -> int:
    prefixes = tuple(f"{prefix}." for prefix in prefixes)
    return sum(size for name, size in sizes.items() if name.startswith(prefixes))
