"""What a config says about sublayers that are not there, and how that reads after further cuts.

A config that describes one stack uses transformers' own schema, ``per_layer_config`` {block: {"skip": [sublayer]}}.
Where that cannot say it, because a config describes two stacks (encoder and decoder in one) or because the stock
class itself reads ``per_layer_config`` and knows no ``skip``, it gets ``skip_sublayers`` {stack: {block: [sublayer]}}.
Block numbers are those of the model that the config describes.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from billhook.anatomy import Anatomy, Stack
from billhook.anatomy.config import resolve
from billhook.anatomy.vocabulary import SHARED_BLOCKS
from billhook.plan.address import SUBLAYERS, Address
from billhook.plan.errors import InputError
from billhook.plan.visits import Orders

PER_LAYER, PER_STACK, PER_STACK_WIDTHS = "per_layer_config", "skip_sublayers", "inner_units"
PER_STACK_RANKS, PER_STACK_BIASES = "linear_ranks", "added_biases"
READ_GLOBALLY = "allow_global_per_layer_attribute_access"  # transformers': plain values may be read beside those


def declares_cuts(content: Any) -> bool:
    """Whether the content of a ``config.json`` says anywhere that a sublayer is skipped or narrower than others, that a
    linear is in two parts or has a bias of its own, or that blocks share weights."""
    if not isinstance(content, dict):
        return False
    layers = content.get(PER_LAYER)
    if isinstance(layers, dict) and any(isinstance(layer, dict) and layer.get("skip") for layer in layers.values()):
        return True
    keys = (PER_STACK, PER_STACK_WIDTHS, PER_STACK_RANKS, PER_STACK_BIASES, READ_GLOBALLY, SHARED_BLOCKS)
    if any(content.get(key) for key in keys):
        return True
    return any(declares_cuts(value) for value in content.values())


def by_config(anatomy: Anatomy) -> dict[str, list[Stack]]:
    """Path of each config that is saved (``config``, ``config.text_config``) -> the stacks it describes."""
    grouped: dict[str, list[Stack]] = {}
    for stack in anatomy.stacks:
        grouped.setdefault(stack.counters[0].owner, []).append(stack)
    return grouped


def read_skips(config: Any, anatomy: Anatomy) -> frozenset[Address]:
    """The sublayers that a model's config lists as skipped. InputError if it lists something the model has no place
    for; a sublayer that is listed need not be there any more."""
    found = set()
    for owner, stacks in by_config(anatomy).items():
        content = part_of(config, owner).to_dict()
        table: Any = content.get(PER_STACK) or {}
        if not table and len(stacks) == 1:
            layers = content.get(PER_LAYER) or {}
            table = {stacks[0].name: {i: layer.get("skip", ()) for i, layer in layers.items()}}
        try:
            found |= {
                Address(stack, int(block), kind)
                for stack, blocks in table.items()
                for block, kinds in blocks.items()
                for kind in kinds
            }
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(
                f"config.json: {owner}.{PER_STACK} is not a map of stack -> block -> list of sublayers"
            ) from error
    lengths = {stack.name: len(stack.blocks) for stack in anatomy.stacks}
    odd = [str(a) for a in found if a.block >= lengths.get(a.stack, 0) or a.sublayer not in SUBLAYERS]
    if odd:
        raise InputError(f"config.json skips {', '.join(sorted(odd))}, which this {anatomy.family} model does not have")
    return frozenset(found)


def skips_after(before: frozenset[Address], drops: frozenset[Address], orders: Orders) -> frozenset[Address]:
    """What is skipped once ``drops`` are gone too, in the block numbers of the smaller model, whose stacks run the
    blocks of ``orders``.

    ``before`` (already skipped), ``drops`` and ``orders`` are in the numbers of the model as it is.
    """
    gone = {a for a in before | drops if a.sublayer is not None}
    return frozenset(Address(a.stack, new, a.sublayer) for a in gone for new in places_of(a, orders))


def places_of(address: Address, orders: Orders) -> list[int]:
    """The places at which the block of an address runs."""
    return [new for new, old in enumerate(orders[address.stack]) if old == address.block]


def write_skips(config: Any, anatomy: Anatomy, skips: frozenset[Address]) -> None:
    """Note ``skips`` in a config whose block counts already are those of the smaller model, in place."""
    for owner, stacks in by_config(anatomy).items():
        table: dict[str, dict[int, list[str]]] = {}
        for address in sorted(a for a in skips if a.stack in {stack.name for stack in stacks}):
            table.setdefault(address.stack, {}).setdefault(address.block, []).append(str(address.sublayer))
        part = part_of(config, owner)
        if len(stacks) == 1 and not part.per_layer_attributes:
            blocks = table.get(stacks[0].name, {})
            part.per_layer_config = {i: {"skip": kinds} for i, kinds in blocks.items()} or None
            continue
        if table or hasattr(part, PER_STACK):
            part.skip_sublayers = {name: {str(i): kinds for i, kinds in rows.items()} for name, rows in table.items()}
        if part.per_layer_attributes and "attention" in table.get(stacks[0].name, {}).get(0, ()):
            _retype_first(part)


def _retype_first(config: Any) -> None:
    """Without its attention the first block may have got another layer type (see ``slots``): where blocks of a type
    must agree in their ``per_layer_config``, the first one takes over that of its new type."""
    layers = {int(i): values for i, values in config.to_dict()[PER_LAYER].items()}
    like = next((i for i, kind in enumerate(config.layer_types) if i and kind == config.layer_types[0]), 0)
    config.per_layer_config = {**layers, 0: layers.get(like, {})}


def part_of(config: Any, path: str) -> Any:
    """The part of a model's config at ``config.PATH``."""
    return resolve(SimpleNamespace(config=config), path)
