"""The residual stream itself: which tensors have an entry for each of its channels, and what else knows their number.

Everything that writes to the stream has them on its output side, everything that reads it on its input side, every
norm on it along its only axis. Stated once, as data (``Residual``); simulation, cut, cut on disk and cost work on it. A
model in which a parameter outside the blocks is not accounted for has a rigid stream, and the reason is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import lcm
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from billhook.anatomy.config import owner_of
from billhook.anatomy.families import HEAD_WIDTH_STATED, NORMS_FROM_ONE, rigid_stream
from billhook.anatomy.groups import width_in
from billhook.anatomy.low_rank import LowRank, is_conv
from billhook.anatomy.roles import NotUnderstood
from billhook.anatomy.types import Anatomy, Residual, Stack
from billhook.anatomy.vocabulary import EMBED_SCALE, STREAM_WIDTH
from billhook.plan.address import Address
from billhook.plan.outline import BlockOutline, Outline, SublayerOutline

_GROUPED = 8  # torch multiplies experts in groups, which takes rows of whole 16 bytes: 8 entries of bfloat16


def with_residuals(model: PreTrainedModel, anatomy: Anatomy) -> Anatomy:
    """The same anatomy with the channels of its stream, in its outline too. Reads names and shapes only."""
    stack = anatomy.stacks[0]
    try:
        if len(anatomy.stacks) > 1:
            raise NotUnderstood("several streams meet in this model")
        residual = _residual(model, anatomy, stack)
    except NotUnderstood as problem:
        stacks = tuple(s.model_copy(update={"rigid": str(problem)}) for s in anatomy.outline.stacks)
        return replace(anatomy, outline=anatomy.outline.model_copy(update={"stacks": stacks}))
    outline = _counted(model, anatomy, residual)
    return replace(anatomy, residuals={stack.name: residual}, outline=outline)


def _residual(model: PreTrainedModel, anatomy: Anatomy, stack: Stack) -> Residual:
    config: Any = owner_of(model, stack.path)[1].config
    family = config.model_type
    if reason := rigid_stream(family):
        raise NotUnderstood(reason)
    if any(isinstance(module, LowRank) for module in model.modules()):
        raise NotUnderstood("linears of the model are in two parts already")
    count = anatomy.outline.stack(stack.name).hidden_size
    axes = dict(_outside(model, anatomy, stack, count))
    norms = [stack.final_norm] if stack.final_norm else []
    for block in stack.blocks:
        norms += [*block.norms, *(norm for part in block.sublayers for norm in part.norms)]
        for part in block.sublayers:
            axes |= {name: _input_axis(model, name) for name in part.reads}
            for name in part.writes:
                axes[name] = _output_axis(model, name)
                axes |= dict(_bias(model, name))
    for path in norms:
        axes |= dict.fromkeys(_norm(model, path, count), 0)
    roots = tuple(p for p, m in model.named_modules() if vars(m).get(EMBED_SCALE) == count**0.5)
    return Residual(
        stack=stack.name,
        count=count,
        axes=tuple(axes.items()),
        scales=_scales(model, anatomy, stack, axes, norms, roots),
        attributes=tuple(_attributes(model, axes, count)),
        shapes=tuple(
            (path, "normalized_shape") for path in norms if hasattr(model.get_submodule(path), "normalized_shape")
        ),
        roots=roots,
        states=_states(model, stack, config),
        multiple=lcm(
            int(config.num_attention_heads) if HEAD_WIDTH_STATED[family] else 1,
            _GROUPED if any(".experts." in name for name in axes) else 1,
        ),
    )


def _outside(model: PreTrainedModel, anatomy: Anatomy, stack: Stack, count: int) -> Iterator[tuple[str, int]]:
    """Everything but the blocks and the final norm: embeddings, and what reads the stream in the end."""
    for path, module in model.named_modules():
        if f"{path}.".startswith(f"{stack.path}.") or path == stack.final_norm:
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}" if path else leaf
            if isinstance(module, nn.Embedding) and parameter.shape[1] == count:
                yield name, 1
            elif isinstance(module, nn.Linear) and module.in_features == count:
                if module.out_features == count and path != anatomy.head:
                    raise NotUnderstood(f"what {name} puts out is as wide as the stream, and may be a part of it")
                if leaf == "weight":
                    yield name, 1
            elif isinstance(module, nn.Conv2d) and module.out_channels == count:
                yield name, 0
            elif not isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding) and parameter.shape[-1] == count:
                yield name, parameter.ndim - 1
            else:
                raise NotUnderstood(f"{name} is no part of the model that is known")


def _input_axis(model: nn.Module, name: str) -> int:
    return 0 if _conv1d(model, name) else model.get_parameter(name).ndim - 1


def _output_axis(model: nn.Module, name: str) -> int:
    return 1 if _conv1d(model, name) else model.get_parameter(name).ndim - 2


def _conv1d(model: nn.Module, name: str) -> bool:
    return is_conv(model.get_submodule(name.rpartition(".")[0]))


def _bias(model: nn.Module, write: str) -> Iterator[tuple[str, int]]:
    """The bias beside a writing weight, which is added to the stream too: (outputs), or (experts, outputs)."""
    path, _, leaf = write.rpartition(".")
    owner = dict(model.get_submodule(path).named_parameters(recurse=False))
    name = "bias" if leaf == "weight" else f"{leaf}_bias"
    if name in owner:
        yield f"{path}.{name}", owner[name].ndim - 1


def _norm(model: nn.Module, path: str, count: int) -> list[str]:
    module = model.get_submodule(path)
    found = {f"{path}.{leaf}": parameter for leaf, parameter in module.named_parameters()}
    if isinstance(module, nn.Identity) and not found:
        return []  # of a sublayer that is gone
    if f"{path}.weight" not in found or not type(module).__name__.endswith("Norm"):
        raise NotUnderstood(f"{path} is no norm with a weight, into which its scale could be folded")
    if any(tuple(parameter.shape) != (count,) for parameter in found.values()):
        raise NotUnderstood(f"{path} does not norm {count} channels")
    return list(found)


def _scales(
    model: PreTrainedModel,
    anatomy: Anatomy,
    stack: Stack,
    axes: dict[str, int],
    norms: list[str],
    roots: tuple[str, ...],
) -> tuple[tuple[str, int, float], ...]:
    """With r the root of channels before over after, a norm divides by r more than one that takes what is gone for
    zeros, and an embedding that is multiplied by the root of their number is multiplied by r less than before. Where
    that embedding is the head too, its weight has grown by r there, and the final norm stays as it is."""
    config: Any = owner_of(model, stack.path)[1].config
    offset = 1.0 if config.model_type in NORMS_FROM_ONE else 0.0
    powers = {f"{path}.weight": 1 for path in norms if f"{path}.weight" in axes}
    if roots and anatomy.head is not None:
        head, embedding = (model.get_submodule(str(path)).weight for path in (anatomy.head, anatomy.embedding))
        if head is embedding:
            powers.pop(f"{stack.final_norm}.weight")
    found = [(name, power, offset) for name, power in powers.items()]
    return (*found, *((f"{path}.weight", 1, 0.0) for path in roots))


def _attributes(model: nn.Module, axes: dict[str, int], count: int) -> Iterator[tuple[str, str]]:
    for path, module in model.named_modules():
        for name in STREAM_WIDTH:
            if vars(module).get(name) == count and type(vars(module)[name]) is int:
                yield path, name
    for parameter, axis in axes.items():
        path, _, leaf = parameter.rpartition(".")
        module = model.get_submodule(path)
        if leaf == "weight" and isinstance(module, nn.Linear):
            yield path, ("out_features", "in_features")[axis]
        elif leaf == "weight" and isinstance(module, nn.Conv2d):
            yield path, "out_channels"


def _states(model: PreTrainedModel, stack: Stack, config: Any) -> tuple[tuple[str, int], ...]:
    """The width of a head, which the config works out from the number of channels unless it is stated."""
    if hasattr(config, "kv_lora_rank"):
        return ()
    for sublayer in (part for block in stack.blocks for part in block.sublayers if part.kind == "attention"):
        core: Any = model.get_submodule(sublayer.reads[0].rpartition(".")[0].rpartition(".")[0])
        return (("head_dim", width_in(core, config)),)
    raise NotUnderstood("it has no attention that tells the width of a head")


def _counted(model: PreTrainedModel, anatomy: Anatomy, residual: Residual) -> Outline:
    """The outline with what each part has for each channel of the stream."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}  # what is tied counts once
    each = {name: sizes.get(name, 0) // residual.count for name, _ in residual.axes}
    stack = anatomy.stack(residual.stack)
    drawn, inside = [], 0
    for block, outline in zip(stack.blocks, anatomy.outline.stack(stack.name).blocks, strict=True):
        parts = {}
        for part in block.sublayers:
            paths = [cut.path for cut in part.cuts]
            parts[part.kind] = _thin_sublayer(anatomy, part.address, outline.sublayers[part.kind], paths, each)
        whole = _sum(each, [block.path])
        rest = whole - sum(part.channel_params for part in parts.values())
        inside += whole
        drawn.append(BlockOutline(sublayers=parts, rest_params=outline.rest_params, rest_channel_params=rest))
    stacked = anatomy.outline.stack(stack.name).model_copy(
        update={"blocks": tuple(drawn), "channel_multiple": residual.multiple}
    )
    head = model.get_parameter(f"{anatomy.head}.weight").numel() // residual.count if anatomy.head else 0
    return anatomy.outline.model_copy(
        update={
            "stacks": (stacked,),
            "other_channel_params": sum(each.values()) - inside,
            "head_channel_params": head,
        }
    )


def _thin_sublayer(
    anatomy: Anatomy, address: Address, outline: SublayerOutline, paths: list[str], each: dict[str, int]
) -> SublayerOutline:
    params = _sum(each, paths)
    experts = sum(n for name, n in each.items() if ".experts." in name and _within(name, paths))
    idle = experts * (outline.experts - outline.active_experts) // outline.experts if outline.experts else 0
    units = {}
    for inner in anatomy.inner.get(address, ()):
        named = {piece.parameter for piece in inner.slices}
        whole = sum(each.get(name, 0) for name in named)
        unused = sum(each.get(name, 0) for name in named if ".experts." in name) if inner.kind == "expert" else 0
        units[inner.kind] = outline.inner[inner.kind].model_copy(
            update={"channel_params": whole // inner.count, "channel_active": (whole - unused) // inner.count}
        )
    return outline.model_copy(
        update={"channel_params": params, "channel_active": params - idle, "inner": {**outline.inner, **units}}
    )


def _within(name: str, paths: list[str]) -> bool:
    return name.startswith(tuple(f"{path}." for path in paths))


def _sum(each: dict[str, int], paths: list[str]) -> int:
    return sum(number for name, number in each.items() if _within(name, paths))
