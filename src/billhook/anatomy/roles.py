"""What one block consists of: its sublayers, how each is silenced, and what stays with the block."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from billhook.anatomy.bridge import BRIDGED
from billhook.anatomy.families import ambiguous_norms, post_norm
from billhook.anatomy.low_rank import LowRank, is_conv
from billhook.anatomy.low_rank_experts import WRITES as EXPERTS_WRITE
from billhook.anatomy.low_rank_experts import LowRankExperts
from billhook.anatomy.types import Block, Cut, Sublayer
from billhook.anatomy.vocabulary import ATTENTION, CROSS_ATTENTION, EXTRAS, LAYOUTS, MLP, NORMS, WRITES, Layout
from billhook.plan.address import SUBLAYERS, Address


class NotUnderstood(Exception):
    """What is odd about a block, in words; collected into one refusal by ``discover``."""


@dataclass
class _Parts:
    """Paths within the block. ``branch`` are the norms and scales that go with each kind."""

    work: dict[str, tuple[str, ...]] = field(default_factory=dict)
    output: dict[str, str] = field(default_factory=dict)
    cuts: dict[str, tuple[Cut, ...]] = field(default_factory=dict)
    branch: dict[str, tuple[str, ...]] = field(default_factory=dict)
    stays: tuple[str, ...] = ()
    parallel: bool = False


def looks_like_block(module: nn.Module) -> bool:
    """Whether a module has an attention among its children, under any name that transformers uses."""
    children = dict(module.named_children())
    if any(name in children for name in ATTENTION):
        return True
    parts = children.get("layer")
    return isinstance(parts, nn.ModuleList) and any(hasattr(part, "SelfAttention") for part in parts)


def read_block(block: nn.Module, address: Address, path: str, config: Any, hidden: int) -> Block:
    """Find the sublayers of one block. Raises NotUnderstood where a parameter belongs to nothing known."""
    children = dict(block.named_children())
    layers = children.get("layer")
    if isinstance(layers, nn.ModuleList):
        parts = _wrapped(layers)
    elif "intermediate" in children and "output" in children:
        parts = _post_norm_wrapped(children)
    else:
        parts = _plain(children, config)
    present = {kind: work for kind, work in parts.work.items() if _has_parameters(block, work)}
    _account(block, parts)
    sublayers = tuple(_sublayer(block, kind, parts, address, path, hidden) for kind in SUBLAYERS if kind in present)
    return Block(address, path, sublayers, tuple(f"{path}.{name}" for name in parts.stays), parts.parallel)


def _plain(children: dict[str, nn.Module], config: Any) -> _Parts:
    """Work modules and norms side by side, the block's forward adding the residual (or handing it to its parts)."""
    parts = _Parts()
    attention = next(name for name in ATTENTION if name in children)
    _work(parts, "attention", children, attention)
    for name in CROSS_ATTENTION:
        if name in children:
            _work(parts, "cross_attention", children, name)
    mlp = next((name for name in MLP if name in children), None)
    if mlp:
        _work(parts, "mlp", children, mlp)
    elif "fc1" in children and "fc2" in children:
        parts.work["mlp"], parts.output["mlp"] = ("fc1", "fc2"), "fc2"
        parts.cuts["mlp"] = (Cut("fc1", "identity"), Cut("fc2", "zero"))
    else:
        raise NotUnderstood(f"no MLP among {', '.join(children)}")

    found = frozenset(name for name in children if name in NORMS and children[name] is not None)
    layout = next((layout for layout in LAYOUTS if layout.names == found), None)
    if layout is None:
        raise NotUnderstood(f"norms in an unknown arrangement: {', '.join(sorted(found)) or 'none'}")
    if ambiguous_norms(config.model_type, found):
        raise NotUnderstood(f"norms {', '.join(sorted(found))} could be pre-norm or post-norm")
    parts.parallel = layout.parallel or bool(getattr(config, "use_parallel_residual", False))
    if post_norm(config):
        parts.stays = tuple(sorted(found))
    else:
        parts.stays = layout.shared
        parts.branch = _branches(layout, parts)
    parts.stays += tuple(name for name in EXTRAS if name in children)
    for kind, names in parts.branch.items():
        parts.cuts[kind] += tuple(Cut(name, "identity") for name in names)
        after = [name for name in names if names.index(name) > 0 or kind not in _leading(layout)]
        if after:
            parts.output[kind] = after[-1]
    return parts


def _leading(layout: Layout) -> frozenset[str]:
    """Kinds whose first norm stands before the work module (all but the pure post-branch layout)."""
    if layout.attention == ("post_attention_layernorm",):
        return frozenset()
    return frozenset(SUBLAYERS)


def _branches(layout: Layout, parts: _Parts) -> dict[str, tuple[str, ...]]:
    named = {"attention": layout.attention, "mlp": layout.mlp, "cross_attention": layout.cross_attention}
    return {kind: names for kind, names in named.items() if kind in parts.work and names}


def _work(parts: _Parts, kind: str, children: dict[str, nn.Module], name: str) -> None:
    module = children[name]
    inner = dict(module.named_children())
    parts.work[kind], parts.output[kind] = (name,), name
    adds_residual = "residual" in inspect.signature(module.forward).parameters
    stub = "residual" if adds_residual else "zero"
    if "self" in inner and "output" in inner:
        raise NotUnderstood(f"{name} wraps its own norm in an unknown way")
    parts.cuts[kind] = (Cut(name, stub if kind == "mlp" else f"{stub}_pair"),)


def _post_norm_wrapped(children: dict[str, nn.Module]) -> _Parts:
    """Attention and MLP each end in a module that adds the residual and normalises (BERT's form): that norm stays."""
    parts = _Parts()
    for kind, name in (("attention", "attention"), ("cross_attention", "crossattention")):
        if name in children:
            parts.work[kind] = (f"{name}.self", f"{name}.output.dense")
            parts.output[kind] = f"{name}.output.dense"
            parts.cuts[kind] = (Cut(f"{name}.self", "zero_pair"), Cut(f"{name}.output.dense", "zero"))
            parts.stays += (f"{name}.output.LayerNorm",)
    parts.work["mlp"], parts.output["mlp"] = ("intermediate", "output.dense"), "output.dense"
    parts.cuts["mlp"] = (Cut("intermediate", "identity"), Cut("output.dense", "zero"))
    parts.stays += ("output.LayerNorm",)
    return parts


def _wrapped(layers: nn.ModuleList) -> _Parts:
    """A list of sublayers that hold their norm and add the residual themselves (T5's form)."""
    parts = _Parts()
    for index, layer in enumerate(layers):
        inner = dict(layer.named_children())
        if "SelfAttention" in inner:
            kind, stub = "attention", "pass_bias"
        elif "EncDecAttention" in inner:
            kind, stub = "cross_attention", "pass_bias"
        elif "DenseReluDense" in inner:
            kind, stub = "mlp", "identity"
        elif not any(True for _ in layer.parameters()):
            continue  # a stub: this sublayer is gone already
        else:
            raise NotUnderstood(f"layer.{index} is neither attention nor MLP")
        name = f"layer.{index}"
        parts.work[kind], parts.output[kind], parts.cuts[kind] = (name,), name, (Cut(name, stub),)
        parts.branch[kind] = (f"{name}.layer_norm",)
    return parts


def _account(block: nn.Module, parts: _Parts) -> None:
    """Every parameter of the block belongs to a sublayer or stays with the block; anything else is not understood."""
    known = [name for group in (*parts.work.values(), *parts.branch.values(), parts.stays, BRIDGED) for name in group]
    left = [name for name, _ in block.named_parameters() if not any(name.startswith(f"{prefix}.") for prefix in known)]
    if left:
        raise NotUnderstood(f"parameters of no known sublayer: {', '.join(left[:6])}{', ...' if left[6:] else ''}")


def _has_parameters(block: nn.Module, work: tuple[str, ...]) -> bool:
    return any(True for name in work for _ in block.get_submodule(name).parameters())


def _sublayer(block: nn.Module, kind: str, parts: _Parts, address: Address, path: str, hidden: int) -> Sublayer:
    reads: list[str] = []
    writes: list[str] = []
    for name in parts.work[kind]:
        for parameter, inputs in _matrices(block.get_submodule(name)):
            full = f"{name}.{parameter}"
            whole, _, part = full.removesuffix(".weight").rpartition(".")
            split = isinstance(block.get_submodule(whole), LowRank)  # reads by its first part, writes by its second
            leaf = whole.rpartition(".")[2] if split else part
            # of a sublayer spread over two modules only the last one writes: both linears may be called ``dense``
            writing = leaf in WRITES and name == parts.work[kind][-1]
            writing |= leaf in EXPERTS_WRITE and isinstance(block.get_submodule(whole), LowRankExperts)
            if split and (part == "expand") != writing:
                continue
            if writing:
                writes.append(f"{path}.{full}")
            elif inputs == hidden:
                reads.append(f"{path}.{full}")
    if not reads or not writes:
        raise NotUnderstood(f"{kind} has no {'reads' if not reads else 'writes'} among its linears")
    stubs = {cut.stub for cut in parts.cuts[kind]}
    unit = Address(address.stack, address.block, kind)
    return Sublayer(
        address=unit,
        kind=kind,
        module=f"{path}.{parts.work[kind][0]}",
        output=f"{path}.{parts.output[kind]}",
        adds_residual=bool(stubs & {"residual", "residual_pair", "pass_bias"}) or stubs == {"identity"},
        reads=tuple(reads),
        writes=tuple(writes),
        norms=tuple(f"{path}.{name}" for name in parts.branch.get(kind, ())),
        cuts=tuple(Cut(f"{path}.{cut.path}", cut.stub) for cut in parts.cuts[kind]),
    )


def _matrices(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Weights with two or more axes and their number of inputs: the last axis, except for GPT-2's Conv1D, which keeps
    its weight as (inputs, outputs). Fused expert tensors are (experts, outputs, inputs)."""
    for owner_name, owner in module.named_modules():
        transposed = is_conv(owner)
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.ndim >= 2 and not isinstance(owner, nn.Embedding):
                full = f"{owner_name}.{name}" if owner_name else name
                yield full, parameter.shape[0 if transposed else -1]
