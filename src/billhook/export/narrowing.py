"""The part of a heterogeneous checkpoint's Python file that gives narrower sublayers tensors of their size."""

from __future__ import annotations

import inspect
from pprint import pformat
from string import Template
from typing import Any

from billhook.anatomy import Anatomy, Inner, Stack
from billhook.surgery.form import Form
from billhook.surgery.narrow import resize

_NARROW = Template('''\
# one row a stack: name, path of its blocks, of its config, and for each kind of inner unit: sublayer, kind, its blocks
# (None: all), the config value that states the size and how much a unit adds, tensors (path, axis, entries a unit) and
# attributes (path, name, amount a unit)
WIDTHS: Any = $widths


$units


$resize

def narrow(model: nn.Module, name: str, path: str, owner: str, kinds: Any) -> None:
    """Give what is narrower tensors of its size."""
    config = reduce(getattr, owner.split("."), model)
    for index, block in enumerate(model.get_submodule(path)):
        for sublayer, kind, blocks, key, amount, tensors, attributes in kinds:
            number = units(config, name, index, sublayer, kind, key, amount)
            if number is None or (blocks and index not in blocks):
                continue
            for inside, axis, width in tensors:
                where, _, leaf = inside.rpartition(".")
                module = block.get_submodule(where)
                old = getattr(module, leaf)
                new = old.new_empty((*old.shape[:axis], number * width, *old.shape[axis + 1 :]))
                setattr(module, leaf, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
            resize(block, attributes, number, setattr)''')

UNITS = """def units(config: Any, name: str, index: int, sublayer: str, kind: str, key: str, amount: int) -> Any:
    listed = (getattr(config, "inner_units", None) or {}).get(name, {}).get(str(index), {}).get(sublayer, {})
    if kind in listed or not key:
        return listed.get(kind)
    size = getattr(config.per_layer_config[index], key)
    return None if size == getattr(config, key) else size // amount"""


def narrowing(anatomy: Anatomy, form: Form, units: str) -> str:
    """The source; ``anatomy`` is that of the stock class, ``units`` that of the function that reads the config."""
    rows = [_row(stack, anatomy, form) for stack in anatomy.stacks]
    return _NARROW.substitute(
        widths=pformat([row for row in rows if row[3]], width=116, sort_dicts=False),
        units=units,
        resize=inspect.getsource(resize),
    )


def _row(stack: Stack, anatomy: Anatomy, form: Form) -> tuple[str, str, str, list[Any]]:
    """Paths are relative to the block. Where units of one kind are not alike in all blocks (heads of two widths, say),
    there is an entry for each sort with the numbers of its blocks."""
    sorts: dict[tuple[str, str], dict[Any, list[int]]] = {}
    for address, kind in form.widths:
        if address.stack == stack.name:
            sorts[str(address.sublayer), kind] = {}
    for block in stack.blocks:
        for sublayer in block.sublayers:
            for inner in anatomy.inner.get(sublayer.address, ()):
                if (sublayer.kind, inner.kind) in sorts:
                    alike = sorts[sublayer.kind, inner.kind]
                    alike.setdefault(_described(inner, f"{block.path}."), []).append(block.address.block)
    kinds = [
        (*kind, blocks if len(alike) > 1 else None, *described)
        for kind, alike in sorts.items()
        for described, blocks in alike.items()
    ]
    return stack.name, stack.path, stack.counters[0].owner, kinds


def _described(inner: Inner, block: str) -> tuple[Any, ...]:
    widths: dict[tuple[str, int], int] = {}
    for piece in inner.slices:
        place = (piece.parameter.removeprefix(block), piece.axis)
        widths[place] = widths.get(place, 0) + piece.width
    key, amount = inner.keys[0] if inner.keys else ("", 1)
    return (
        key,
        amount,
        tuple((path, axis, width) for (path, axis), width in widths.items()),
        tuple((path.removeprefix(block), name, amount) for path, name, amount in inner.attributes),
    )
