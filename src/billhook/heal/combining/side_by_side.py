"""Blocks laid side by side: one sublayer with inner units of all of them, and what must be alike for that."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy.config import owners, resolve
from billhook.anatomy.types import Anatomy, Block, Inner, Stack, Sublayer
from billhook.anatomy.vocabulary import NOT_PER_BLOCK
from billhook.heal.gaps import alike, names_in
from billhook.heal.refit.plain_norms import absorbed, without_norm
from billhook.plan.errors import InputError

KINDS = {"attention": "group", "mlp": "neuron"}


def units_in(anatomy: Anatomy, sublayer: Sublayer) -> Inner:
    """The heads or neurons of a sublayer. InputError where it has none that can move."""
    inner = next((u for u in anatomy.inner.get(sublayer.address, ()) if u.kind == KINDS.get(sublayer.kind)), None)
    if inner is None:
        other = "its units share a router" if sublayer.kind == "mlp" else "it reads another stream"
        raise InputError(f"{sublayer.address} has no units that can move: {anatomy.rigid.get(sublayer.address, other)}")
    return inner


def require_movable(model: nn.Module, anatomy: Anatomy, block: Block) -> None:
    """InputError for a block whose units cannot move into another one."""
    for sublayer in block.sublayers:
        units_in(anatomy, sublayer)
        absorbed(model, block, sublayer)


def unlike(model: nn.Module, anatomy: Anatomy, stack: Stack, one: Block, other: Block) -> str:
    """Why units of one block would not do the same in the other; empty if they would."""
    mine, theirs = names_in(model, one), names_in(model, other)
    if not alike(model, mine, theirs):
        return "they have other parameters"
    for name in _shared(anatomy, one, mine):
        if not torch.equal(model.get_parameter(mine[name]), model.get_parameter(theirs[name])):
            return f"all units of each read its own {name}"
    for owner in owners(stack):
        for key, value in vars(resolve(model, owner)).items():
            listed = isinstance(value, (list, tuple)) and len(value) == len(stack.blocks) and key not in NOT_PER_BLOCK
            if listed and value[one.address.block] != value[other.address.block]:
                return f"their {key} differ"
    ours, others = _settings(model, one), _settings(model, other)
    odd = sorted(place for place in ours.keys() | others.keys() if ours.get(place) != others.get(place))
    return f"their {odd[0]} differ" if odd else ""


def pairs(model: nn.Module, anatomy: Anatomy, stack: Stack) -> list[int]:
    """The blocks that can become one with the next. InputError with the first reason where there is none."""
    found: list[int] = []
    reasons: list[str] = []
    for number, (one, other) in enumerate(pairwise(stack.blocks)):
        try:
            require_movable(model, anatomy, one)
            require_movable(model, anatomy, other)
            why = unlike(model, anatomy, stack, one, other)
        except InputError as error:
            why = str(error)
        else:
            why = why and f"{one.address} and the next are not alike: {why}"
        if why:
            reasons.append(why)
        else:
            found.append(number)
    if not found:
        raise InputError(reasons[0] if reasons else f"{stack.name} has a single block")
    return found


def side_by_side(
    model: nn.Module,
    anatomy: Anatomy,
    into: Block,
    blocks: Sequence[Block],
    kind: str,
    units: Iterable[int],
) -> dict[str, Tensor]:
    """The parameters of one sublayer with these ``units`` of those of all ``blocks``, by the names of ``into``'s.

    Units are counted through the blocks, in their order; with all of them it computes the sum of what the sublayers
    would write, each given the stream that it is given. Weights of norms are moved into the reads, the write's bias is
    the sum of all biases.
    """
    sublayers = [next(s for s in block.sublayers if s.kind == kind) for block in blocks]
    changed = [without_norm(model, b, s) for b, s in zip(blocks, sublayers, strict=True)]
    home = sublayers[blocks.index(into)]
    inner = units_in(anatomy, home)
    found = absorbed(model, into, home).plain

    def all_of(name: str) -> list[Tensor]:
        inside = name.removeprefix(f"{into.path}.")
        names = [f"{block.path}.{inside}" for block in blocks]
        return [c[n] if n in c else model.get_parameter(n).detach() for c, n in zip(changed, names, strict=True)]

    units = list(units)
    for name in dict.fromkeys(piece.parameter for piece in inner.slices):
        pieces = sorted((p for p in inner.slices if p.parameter == name), key=lambda p: p.start)
        axis, tensors = pieces[0].axis, all_of(name)
        size = tensors[0].shape[axis]
        entries = [
            unit // inner.count * size + piece.start + unit % inner.count * piece.width + i
            for piece in pieces
            for unit in units
            for i in range(piece.width)
        ]
        found[name] = torch.cat(tensors, axis).index_select(axis, torch.tensor(entries, device=tensors[0].device))
    bias = home.writes[0].removesuffix("weight") + "bias"
    if any(name == bias for name, _ in model.get_submodule(into.path).named_parameters(prefix=into.path)):
        found[bias] = torch.stack(all_of(bias)).float().sum(0).to(all_of(bias)[0].dtype)
    return found


def _shared(anatomy: Anatomy, block: Block, names: dict[str, str]) -> list[str]:
    """The parameters of a block that belong neither to a unit, nor to a norm on the stream, nor are a write's bias."""
    owned = {piece.parameter for s in block.sublayers for u in anatomy.inner.get(s.address, ()) for piece in u.slices}
    owned |= {name.removesuffix("weight") + "bias" for s in block.sublayers for name in s.writes}
    norms = tuple(f"{norm}." for norm in (*block.norms, *(n for s in block.sublayers for n in s.norms)))
    return [inside for inside, name in names.items() if name not in owned and not name.startswith(norms)]


def _settings(model: nn.Module, block: Block) -> dict[str, Any]:
    """What the modules of a block keep beside their parameters: their classes and their plain values."""
    found: dict[str, Any] = {}
    for path, module in model.get_submodule(block.path).named_modules():
        found[path or "class"] = type(module).__name__
        for name, value in vars(module).items():
            told = not name.startswith("_") and name not in ("layer_idx", "training")
            if told and (value is None or isinstance(value, (bool, int, float, str))):
                found[f"{path}.{name}" if path else name] = value
    return found
