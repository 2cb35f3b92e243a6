"""The inner units of an attention: its KV groups."""

from __future__ import annotations

from typing import Any

from billhook.anatomy.families import FUSED_QKV, HEAD_WIDTH_STATED, LOOKED_UP
from billhook.anatomy.roles import NotUnderstood
from billhook.anatomy.tensors import Work
from billhook.anatomy.types import Inner, Slice
from billhook.anatomy.vocabulary import ALL_HEADS, APART, HEAD_WIDTH, HEADS, KEY_NORMS, KV_HEADS, QUERY_NORMS


def groups(work: Work) -> Inner:
    """A KV group: one key and value head with the query heads that read it, so that their ratio stays what it was.

    Norms of queries and keys that all heads share are untouched; those with an entry a head lose the group's. A norm
    that runs over all heads at once (OLMo 2) runs over those that are left.
    """
    if len(work.sublayer.writes) != 1:
        raise NotUnderstood("it writes through several linears")
    write = work.sublayer.writes[0]
    if work.find("kv_b_proj.weight"):
        slices, count, heads, width = _latent(work)
    elif fused := [n for n in work.sublayer.reads if n.rpartition(".")[0].rpartition(".")[2] not in _APART_NAMES]:
        slices, count, heads, width = _fused(work, fused, work.inputs(write))
    else:
        slices, count, heads, width = _apart(work)
    if work.inputs(write) % count:
        raise NotUnderstood(f"{write} has {work.inputs(write)} inputs for {count} groups")
    slices += work.columns(write, work.inputs(write) // count)
    slices += _per_head(work, count, heads, width)
    work.account()
    ratio = heads // count
    attributes = work.sizes(
        count, heads=(HEADS, heads), kv_heads=(KV_HEADS, count), all_heads=(ALL_HEADS, heads * width)
    )
    attributes += [
        (work.sublayer.module, f"config.{name}", ratio) for name in LOOKED_UP.get(work.config.model_type, ())
    ]
    keys, states, divides = _keys(work, count, heads, width)
    attributes += work.linear_sizes(slices)
    return Inner("group", count, tuple(slices), tuple(attributes), keys, states, divides, heads=ratio)


_APART_NAMES = frozenset(name for names in APART for name in names)


def _apart(work: Work) -> tuple[list[Slice], int, int, int]:
    for names in APART:
        q, k, v = (work.find(f"{name}.weight") for name in names)
        if q:
            break
    if not q or not k:
        raise NotUnderstood("it has no keys of its own" if q else "it has no queries that are known")
    width = head_width(work, q)
    heads, count = work.outputs(q) // width, work.outputs(k) // width
    _whole(work, q, heads * width)
    _whole(work, k, count * width)
    if heads % count:
        raise NotUnderstood(f"{heads} query heads do not divide among {count} key heads")
    slices = work.rows(q, heads // count * width) + work.rows(k, width)
    if v:  # else the keys are the values too
        slices += work.rows(v, work.outputs(v) // count)
    return slices, count, heads, width


def _fused(work: Work, names: list[str], inner: int) -> tuple[list[Slice], int, int, int]:
    layout = FUSED_QKV.get(work.config.model_type)
    if len(names) > 1 or layout is None:
        raise NotUnderstood(f"{names[0]} is laid out in a way that is not known")
    width = head_width(work, names[0])
    heads = inner // width
    count = (work.outputs(names[0]) // width - heads) // 2
    _whole(work, names[0], (heads + 2 * count) * width)
    if count < 1 or heads % count:
        raise NotUnderstood(f"{names[0]} holds no equal groups of heads")
    if layout == "interleaved":
        return work.rows(names[0], (heads // count + 2) * width), count, heads, width
    bias = names[0].removesuffix(".weight") + ".bias"
    slices = []
    for start, each in ((0, heads // count), (heads, 1), (heads + count, 1)):
        slices.append(Slice(names[0], int(work.conv(names[0])), each * width, start * width))
        if bias in work.left:
            slices.append(Slice(bias, 0, each * width, start * width))
    work.stays(names[0], bias)
    return slices, count, heads, width


def _latent(work: Work) -> tuple[list[Slice], int, int, int]:
    """Keys and values expanded from one latent for all heads (DeepSeek-V2, section 2.1): a head is a unit, and none of
    the cache is its own."""
    q, kv = work.find("q_b_proj.weight") or work.find("q_proj.weight"), work.find("kv_b_proj.weight")
    if not q or not kv:
        raise NotUnderstood("it has no queries that are known")
    width = int(work.config.qk_head_dim)
    heads = work.outputs(q) // width
    _whole(work, q, heads * width)
    _whole(work, kv, heads * (work.outputs(kv) // heads))
    slices = work.rows(q, width) + work.rows(kv, work.outputs(kv) // heads)
    for name in ("q_a_proj.weight", "q_a_proj.bias", "q_a_layernorm.weight", "kv_a_layernorm.weight"):
        work.stays(work.find(name) or "")
    work.stays(work.find("kv_a_proj_with_mqa.weight") or "", work.find("kv_a_proj_with_mqa.bias") or "")
    return slices, heads, heads, width


def _per_head(work: Work, count: int, heads: int, width: int) -> list[Slice]:
    """Norms of queries and keys, and sinks: (head width) for all heads, or with one or ``width`` entries a head."""
    slices = []
    for names, units in ((QUERY_NORMS, heads), (KEY_NORMS, count), (("sinks",), heads)):
        for name in [n for n in work.left if _holder(n) in names]:
            shape = tuple(work.left[name].shape)
            if shape == (width,) and names != ("sinks",):
                work.stays(name)
            elif shape[0] in (units, units * width):
                slices += work.entries(name, shape[0] // count)
            else:
                raise NotUnderstood(f"{name} has no entry a head")
    return slices


def _holder(name: str) -> str:
    """The module of a norm's weight; the parameter itself where it hangs on the attention."""
    parts = name.split(".")
    return parts[-2] if parts[-1] in ("weight", "bias") else parts[-1]


def head_width(work: Work, read: str) -> int:
    """Channels a head, from the module that holds the projection ``read``, else from the config."""
    return width_in(work.modules[read.rpartition(".")[0].rpartition(".")[0]], work.config)


def width_in(core: Any, config: Any) -> int:
    """Channels a head, from the module of an attention, else from the config."""
    for source in (core, config):
        for name in HEAD_WIDTH:
            value = getattr(source, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return int(config.hidden_size // config.num_attention_heads)


def _keys(
    work: Work, count: int, heads: int, width: int
) -> tuple[tuple[tuple[str, int], ...], tuple[tuple[str, int], ...], int]:
    family = work.saved.model_type
    query, key = work.stated(("num_attention_heads",), heads), work.stated(("num_key_value_heads",), count)
    if family not in HEAD_WIDTH_STATED or query is None:
        return (), (), 0
    keys = [(query, heads // count)] + ([(key, 1)] if key else [])
    if key is None and hasattr(work.saved, "num_key_value_heads"):
        return (), (), 0
    states = () if hasattr(work.saved, "kv_lora_rank") else (("head_dim", width),)
    divides = int(work.saved.hidden_size) if HEAD_WIDTH_STATED[family] else 0
    return tuple(keys), states, divides


def _whole(work: Work, name: str, expected: int) -> None:
    if work.outputs(name) != expected:
        raise NotUnderstood(f"{name} has {work.outputs(name)} outputs, which are not whole heads")
