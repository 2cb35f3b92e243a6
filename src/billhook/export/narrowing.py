"""The part of a heterogeneous checkpoint's Python file that gives narrower sublayers tensors of their size."""

from __future__ import annotations

import inspect
from pprint import pformat
from string import Template
from typing import Any

from billhook.anatomy import Anatomy, Stack
from billhook.plan.errors import InputError
from billhook.surgery.form import Form
from billhook.surgery.narrow import resize

_NARROW = Template('''# one row a stack: name, path of its blocks, of its config, and for each kind of inner unit: sublayer, kind, the config
# value that states the size and by how much a unit, tensors (path, axis, entries a unit), attributes (path, name, a unit)
WIDTHS: Any = $widths


$units


$resize

def narrow(model: nn.Module, name: str, path: str, owner: str, kinds: Any) -> None:
    """Give what is narrower tensors of its size."""
    config = reduce(getattr, owner.split("."), model)
    for index, block in enumerate(model.get_submodule(path)):
        for sublayer, kind, key, amount, tensors, attributes in kinds:
            number = units(config, name, index, sublayer, kind, key, amount)
            if number is None:
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
    """The source; ``anatomy`` is that of the stock class, ``units`` the source of the function that reads the config."""
    rows = [_row(stack, anatomy, form) for stack in anatomy.stacks]
    return _NARROW.substitute(
        widths=pformat([row for row in rows if row[3]], width=116, sort_dicts=False),
        units=units,
        resize=inspect.getsource(resize),
    )


def _row(stack: Stack, anatomy: Anatomy, form: Form) -> tuple[str, str, str, list[Any]]:
    """Paths relative to the block; units of one kind must be alike in every block of the stack that has them."""
    kinds: dict[tuple[str | None, str], Any] = {}
    narrow = {(address.sublayer, kind) for address, kind in form.widths if address.stack == stack.name}
    for block in stack.blocks:
        for sublayer in block.sublayers:
            for inner in anatomy.inner.get(sublayer.address, ()):
                if (sublayer.kind, inner.kind) not in narrow:
                    continue
                widths: dict[tuple[str, int], int] = {}
                for piece in inner.slices:
                    place = (piece.parameter.removeprefix(f"{block.path}."), piece.axis)
                    widths[place] = widths.get(place, 0) + piece.width
                row = (
                    *(inner.keys[0] if inner.keys else ("", 1)),
                    [(inside, axis, width) for (inside, axis), width in widths.items()],
                    [(path.removeprefix(f"{block.path}."), name, amount) for path, name, amount in inner.attributes],
                )
                if kinds.setdefault((sublayer.kind, inner.kind), row) != row:
                    raise InputError(
                        f"the blocks of {stack.name} differ in their {inner.kind}s; their {sublayer.kind} cannot get "
                        "narrower"
                    )
    return stack.name, stack.path, stack.counters[0].owner, [(*kind, *row) for kind, row in kinds.items()]
