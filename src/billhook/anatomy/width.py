"""What can be cut inside a sublayer: for every family, which entries of which tensors belong to one inner unit.

This is stated here once, as data (``Inner``); simulation, physical cut, cut on disk, saved form and cost all work on
it. Every parameter of a sublayer must be accounted for, or the sublayer has no inner units and the reason is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from billhook.anatomy.config import owner_of, resolve
from billhook.anatomy.families import RIGID_HEADS
from billhook.anatomy.groups import groups
from billhook.anatomy.low_rank import LowRank
from billhook.anatomy.low_rank_experts import LowRankExperts
from billhook.anatomy.neurons import experts, neurons
from billhook.anatomy.roles import NotUnderstood
from billhook.anatomy.tensors import Work
from billhook.anatomy.types import Anatomy, Inner, Stack, Sublayer
from billhook.plan.address import Address
from billhook.plan.outline import InnerOutline, Outline, SublayerOutline


def inner_units(model: PreTrainedModel, anatomy: Anatomy) -> dict[Address, tuple[Inner, ...]]:
    """The inner units of every sublayer that has any. Reads names and shapes only; works on the meta device."""
    return _read(model, anatomy)[0]


def widened(model: PreTrainedModel, anatomy: Anatomy) -> Anatomy:
    """The same anatomy with the inner units of every sublayer, in its outline too."""
    inner, rigid = _read(model, anatomy)
    owners = {stack.name: stack.counters[0].owner for stack in anatomy.stacks}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}

    def drawn(address: Address, sublayer: SublayerOutline) -> SublayerOutline:
        for group in (u for u in inner.get(address, ()) if u.heads):
            # counted on the tensors: the config of a narrower model may say other numbers
            heads = group.heads * group.count
            kv_heads = heads if sublayer.kv_heads == sublayer.heads else group.count
            cached = bool(sublayer.cache_width) and not _latent(group)
            width = 2 * kv_heads * sublayer.head_dim if cached else sublayer.cache_width
            sublayer = sublayer.model_copy(update={"heads": heads, "kv_heads": kv_heads, "cache_width": width})
        units = {u.kind: _outline(u, sublayer, owners[address.stack], sizes) for u in inner.get(address, ())}
        return sublayer.model_copy(update={"inner": units, "rigid": rigid.get(address, "")})

    return replace(anatomy, inner=inner, rigid=rigid, outline=_redrawn(anatomy.outline, drawn))


def _read(model: PreTrainedModel, anatomy: Anatomy) -> tuple[dict[Address, tuple[Inner, ...]], dict[Address, str]]:
    inner: dict[Address, tuple[Inner, ...]] = {}
    rigid: dict[Address, str] = {}
    for stack in anatomy.stacks:
        for sublayer in (s for block in stack.blocks for s in block.sublayers):
            try:
                inner[sublayer.address] = (_units(model, anatomy, stack, sublayer),)
            except NotUnderstood as problem:
                rigid[sublayer.address] = str(problem)
        _agree(inner, rigid, stack)
    return inner, rigid


def _units(model: PreTrainedModel, anatomy: Anatomy, stack: Stack, sublayer: Sublayer) -> Inner:
    config: Any = owner_of(model, stack.path)[1].config
    saved = resolve(model, stack.counters[0].owner)
    work = Work(model, sublayer, config, saved)
    if any(isinstance(module, LowRank | LowRankExperts) for module in work.modules.values()):
        raise NotUnderstood("linears of it are in two parts already")
    if sublayer.kind == "mlp":
        return experts(work) if work.expert_lists() else neurons(work)
    pinned = anatomy.outline.pinned.get(str(sublayer.address))
    rule = RIGID_HEADS.get(config.model_type)
    reason = pinned or (rule(config) if rule else None)
    if reason:
        raise NotUnderstood(reason)
    return groups(work)


def _agree(inner: dict[Address, tuple[Inner, ...]], rigid: dict[Address, str], stack: Stack) -> None:
    """A config value must state the size of all sublayers of its kind in a stack, or it cannot state that of any."""
    here = [s.address for block in stack.blocks for s in block.sublayers]
    for part in {address.sublayer for address in here}:
        alike = [address for address in here if address.sublayer == part]
        for kind in {unit.kind for address in alike for unit in inner.get(address, ())}:
            places = {address: u for address in alike for u in inner.get(address, ()) if u.kind == kind}
            if len({unit.keys for unit in places.values()}) > 1 or any(address in rigid for address in alike):
                for address, unit in places.items():
                    inner[address] = (replace(unit, keys=(), states=(), divides=0),)


def _outline(inner: Inner, sublayer: SublayerOutline, owner: str, sizes: dict[str, int]) -> InnerOutline:
    named = {s.parameter for s in inner.slices}
    whole = sum(sizes.get(name, 0) for name in named)  # of a router's bias that is a buffer: none
    params = whole // inner.count
    idle = (
        sum(sizes.get(name, 0) for name in named if ".experts." in name) // inner.count if inner.kind == "expert" else 0
    )
    group = inner.kind == "group"
    return InnerOutline(
        count=inner.count,
        params=params,
        active_params=params - idle,
        heads=sublayer.heads // inner.count if group else 0,
        kv_heads=sublayer.kv_heads // inner.count if group else 0,
        cache_width=sublayer.cache_width // inner.count if group and not _latent(inner) else 0,
        key=f"{owner}.{inner.keys[0][0]}" if inner.keys else "",
        amount=inner.keys[0][1] if inner.keys else 1,
        divides=inner.divides,
        least=inner.least,
        parts=inner.parts,
    )


def _latent(inner: Inner) -> bool:
    """Whether the cache is of one latent for all heads."""
    return any(piece.parameter.endswith("kv_b_proj.weight") for piece in inner.slices)


def _redrawn(outline: Outline, drawn: Callable[[Address, SublayerOutline], SublayerOutline]) -> Outline:
    stacks = []
    for stack in outline.stacks:
        blocks = []
        for index, block in enumerate(stack.blocks):
            parts = {k: drawn(Address(stack.name, index, k), s) for k, s in block.sublayers.items()}
            blocks.append(block.model_copy(update={"sublayers": parts}))
        stacks.append(stack.model_copy(update={"blocks": tuple(blocks)}))
    return outline.model_copy(update={"stacks": tuple(stacks)})
