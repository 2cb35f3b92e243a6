"""What a config says about sublayers that are narrower than its plain values make them.

A config that describes one stack uses transformers' own schema, ``per_layer_config`` {block: {"intermediate_size": n}},
next to ``skip`` (see ``skips``), if it has plain values for these sizes. Otherwise it gets ``inner_units``
{stack: {block: {sublayer: {kind: number}}}}. Block numbers are those of the model that the config describes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from billhook.anatomy import Anatomy, Inner, Stack
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Keep
from billhook.plan.visits import Orders
from billhook.plan.widths import Counts, counts
from billhook.surgery.skips import PER_LAYER, PER_STACK_WIDTHS, READ_GLOBALLY, by_config, part_of, places_of


def read_widths(config: Any, anatomy: Anatomy) -> Counts:
    """How many units a model's config lists for a sublayer, where its plain values say something else. ``anatomy`` is
    that of the model as its plain values make it, or of the one that is narrow already. InputError if it lists
    something that the model has no place for."""
    found: Counts = {}
    for owner, stacks in by_config(anatomy).items():
        part = part_of(config, owner)
        table = getattr(part, PER_STACK_WIDTHS, None) or {}
        try:
            found |= {
                (Address(stack, int(block), sublayer), kind): int(number)
                for stack, blocks in table.items()
                for block, sublayers in blocks.items()
                for sublayer, units in sublayers.items()
                for kind, number in units.items()
            }
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(
                f"config.json: {owner}.{PER_STACK_WIDTHS} is not a map of stack -> block -> sublayer -> kind -> number"
            ) from error
        if len(stacks) == 1 and getattr(part, READ_GLOBALLY, False):
            found |= _per_layer(part, stacks[0], anatomy)
    for (address, kind), number in found.items():
        known = {inner.kind: inner for inner in anatomy.inner.get(address, ())}
        if kind not in known or number < 1:
            raise InputError(
                f"config.json gives {address} {number} {kind}s; this {anatomy.family} model cannot have them"
            )
    return found


def _per_layer(part: Any, stack: Stack, anatomy: Anatomy) -> Counts:
    layers = _layers(part)
    return {
        (address, inner.kind): layers[address.block][key] // amount
        for address, units in anatomy.inner.items()
        for inner in units
        for key, amount in inner.keys[:1]
        if address.stack == stack.name and key in layers.get(address.block, {})
    }


def _layers(part: Any) -> dict[int, dict[str, Any]]:
    return {int(i): values for i, values in (part.to_dict().get(PER_LAYER) or {}).items()}


def widths_after(before: Counts, drops: frozenset[Address], keeps: Iterable[Keep], orders: Orders) -> Counts:
    """What is narrower once a plan is carried out, in the block numbers of the smaller model."""
    return {
        (Address(a.stack, new, a.sublayer), kind): number
        for (a, kind), number in (before | counts(keeps)).items()
        if a not in drops
        for new in places_of(a, orders)
    }


def clear_widths(config: Any, anatomy: Anatomy) -> None:
    """Take out all that ``write_widths`` may have noted."""
    for owner, stacks in by_config(anatomy).items():
        part = part_of(config, owner)
        vars(part).pop(PER_STACK_WIDTHS, None)
        if getattr(part, READ_GLOBALLY, False):
            keys = {key for stack in stacks for inner in _kinds(anatomy, stack).values() for key, _ in inner.keys}
            left = {i: {k: v for k, v in values.items() if k not in keys} for i, values in _layers(part).items()}
            del vars(part)[READ_GLOBALLY]
            part.per_layer_config = {i: values for i, values in left.items() if values} or None


def write_widths(config: Any, anatomy: Anatomy, widths: Counts) -> Counts:
    """Note ``widths`` in a config that is otherwise that of the smaller model, in place. Returns those that its plain
    values do not say already."""
    noted: Counts = {}
    for owner, stacks in by_config(anatomy).items():
        part = part_of(config, owner)
        known = {stack.name: _kinds(anatomy, stack) for stack in stacks}
        here = {
            (address, kind): number
            for (address, kind), number in sorted(widths.items())
            if address.stack in known and not _stated(part, known[address.stack][address.sublayer, kind], number)
        }
        noted |= here
        if not here:
            continue
        if (
            len(stacks) == 1
            and not part.per_layer_attributes
            and all(
                inner.keys and _fits(inner, number)
                for (address, kind), number in here.items()
                for inner in [known[address.stack][address.sublayer, kind]]
            )
        ):
            _write_layers(part, known[stacks[0].name], here)
        else:
            setattr(part, PER_STACK_WIDTHS, _nested(here))
    return noted


def _write_layers(part: Any, kinds: Mapping[tuple[str | None, str], Inner], here: Counts) -> None:
    layers = _layers(part)
    for (address, kind), number in here.items():
        inner = kinds[address.sublayer, kind]
        layers[address.block] = layers.get(address.block, {}) | {key: amount * number for key, amount in inner.keys}
        for key, value in inner.states:
            setattr(part, key, value)
    setattr(part, READ_GLOBALLY, True)  # the plain values are what the blocks without an entry have
    part.per_layer_config = layers


def _kinds(anatomy: Anatomy, stack: Stack) -> dict[tuple[str | None, str], Inner]:
    """What units of a kind are like in a stack: they are alike but for their number."""
    return {
        (address.sublayer, inner.kind): inner
        for address, units in anatomy.inner.items()
        if address.stack == stack.name
        for inner in units
    }


def _stated(part: Any, inner: Inner, number: int) -> bool:
    return bool(inner.keys) and all(vars(part)[key] == amount * number for key, amount in inner.keys)


def _fits(inner: Inner, number: int) -> bool:
    return not inner.divides or inner.divides % (inner.keys[0][1] * number) == 0


def _nested(here: Counts) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for (address, kind), number in here.items():
        blocks = table.setdefault(address.stack, {})
        blocks.setdefault(str(address.block), {}).setdefault(str(address.sublayer), {})[kind] = number
    return table
