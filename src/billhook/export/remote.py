"""The Python file in a heterogeneous checkpoint, for users without Billhook: a subclass of the installed class."""

from __future__ import annotations

import inspect
from pprint import pformat
from string import Template
from textwrap import indent
from typing import Any

from billhook.anatomy import Anatomy, Stack, slots, stubs
from billhook.export.biasing import biasing
from billhook.export.narrowing import UNITS, narrowing
from billhook.export.ranking import splitting
from billhook.plan.errors import InputError
from billhook.surgery.form import Form

MODULE = "modeling_billhook"
ABSENT: Any = object()  # in the place of a value of config.json: it is removed

_CODE = Template('''"""$stock without what config.json lists as missing. Written by Billhook.

Needs transformers and nothing else.
"""

from __future__ import annotations

${standard}from collections import Counter, defaultdict
from functools import reduce
from typing import Any

import torch
import transformers
from torch import nn
$imports

$sections


class $name(transformers.$stock):$config_class
    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
$calls

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # stored weights have the stock class's names: transformers may rename them as it does there
''')

_CUT = Template('''$parts

STUBS = {$stubs}

# one row a stack: name, path of its blocks, of its config, of the attentions in a block, what silences each sublayer
STACKS: Any = $stacks


$skipped


def cut(model: nn.Module, name: str, path: str, owner: str, attentions: Any, cuts: Any) -> None:
    """Take out what is skipped, and give the attentions that are left their places in the KV cache."""
    config = reduce(getattr, owner.split("."), model)
    blocks = list(model.get_submodule(path))
    skips = [skipped(config, name, index) for index in range(len(blocks))]
    for kind, inside in attentions.items():
        types = getattr(config, "layer_types", None) if kind == "attention" else None
        _, slots = cache_slots(types or ["full_attention"] * len(blocks), [kind not in skip for skip in skips])
        for block, slot in zip(blocks, slots, strict=True):
            for part in block.get_submodule(inside).modules():
                if slot is not None and getattr(part, "layer_idx", None) is not None:
                    part.layer_idx = slot
    for block, kinds in zip(blocks, skips, strict=True):
        for inside, stub in (pair for kind in kinds for pair in cuts[kind].items()):
            block.set_submodule(inside, STUBS[stub]())''')

_SHARE = Template('''# one row a stack: name, path of its blocks, of its config
SHARED: Any = $stacks


def share(model: nn.Module, name: str, path: str, owner: str) -> None:
    """Give blocks the weights of the earlier one that the config lists; they are in the file once."""
    config = reduce(getattr, owner.split("."), model)
    for new, first in config.shared_blocks.get(name, {}).items():
        ties = {}
        for inside, parameter in model.get_submodule(f"{path}.{first}").named_parameters(remove_duplicate=False):
            where, _, leaf = inside.rpartition(".")
            setattr(model.get_submodule(f"{path}.{new}").get_submodule(where), leaf, parameter)
            ties[f"{path}.{new}.{inside}"] = f"{path}.{first}.{inside}"
        model.all_tied_weights_keys = {**model.all_tied_weights_keys, **ties}
        model._tied_weights_keys = {**(model._tied_weights_keys or {}), **ties}''')

_SKIPPED = """def skipped(config: Any, name: str, index: int) -> Any:
    if getattr(config, "skip_sublayers", None):
        return config.skip_sublayers.get(name, {}).get(str(index), ())
    return getattr(config.per_layer_config[index], "skip", ())"""


def remote_code(stock: str, anatomy: Anatomy, form: Form) -> str:
    """The source of ``modeling_billhook.py``. ``anatomy`` is that of the stock class before ``form`` is carried out."""
    return render(stock, anatomy, form, name=stock, skipped=_SKIPPED, units=UNITS)


def render(
    stock: str,
    anatomy: Anatomy,
    form: Form,
    *,
    name: str,
    skipped: str,
    units: str,
    imports: str = "",
    own: str = "",
) -> str:
    """As ``remote_code`` for a class ``name``; ``skipped`` and ``units`` are the source of the functions that read the
    config, ``own`` a line of the class body."""
    sections, calls = [], []
    if form.widths:  # first: a sublayer is narrowed before another one goes
        sections.append(narrowing(anatomy, form, units))
        calls.append("for stack in WIDTHS:\n    narrow(self, *stack)")
    if form.biases:
        sections.append(biasing(anatomy, form))
        calls.append("for stack in BIASES:\n    bias(self, *stack)")
    if form.ranks:
        sections.append(splitting(anatomy, form))
        calls.append("for stack in RANKS:\n    split(self, *stack)")
    if form.skips:
        sections.append(_cutting(anatomy, form, skipped))
        calls.append("for stack in STACKS:\n    cut(self, *stack)")
    if form.shared:  # last: a block hands on what is left of it
        names = {address.stack for address in form.shared}
        rows = [(s.name, s.path, s.counters[0].owner) for s in anatomy.stacks if s.name in names]
        sections.append(_SHARE.substitute(stacks=pformat(rows, width=116)))
        calls.append("for stack in SHARED:\n    share(self, *stack)")
    return _CODE.substitute(
        stock=stock,
        name=name,
        standard="import copy\n" if form.widths else "",
        imports=imports,
        config_class=f"\n    {own}\n" if own else "",
        sections="\n\n\n".join(sections),
        calls=indent("\n".join(calls), " " * 8),
    )


def _cutting(anatomy: Anatomy, form: Form, skipped: str) -> str:
    rows = [_row(stack) for stack in anatomy.stacks if any(a.stack == stack.name for a in form.skips)]
    used = sorted({stub for row in rows for cuts in row[4].values() for stub in cuts.values()})
    classes: list[Any] = [stubs.STUBS[stub] for stub in used]
    parts = [inspect.getsource(part) for part in (stubs._stream, *classes, slots.cache_slots)]
    return _CUT.substitute(
        parts="\n\n".join(parts),
        stubs=", ".join(f'"{stub}": {stubs.STUBS[stub].__name__}' for stub in used),
        stacks=pformat(rows, width=116, sort_dicts=False),
        skipped=skipped,
    )


def _row(stack: Stack) -> tuple[str, str, str, dict[str, str], dict[str, dict[str, str]]]:
    """Paths relative to the block; they must be the same in every block of the stack that has the sublayer."""
    attentions: dict[str, str] = {}
    cuts: dict[str, dict[str, str]] = {}
    for block in stack.blocks:
        for sublayer in block.sublayers:
            inside = {_inside(cut.path, block.path): cut.stub for cut in sublayer.cuts}
            if cuts.setdefault(sublayer.kind, inside) != inside:
                raise InputError(f"the blocks of {stack.name} differ in their {sublayer.kind}; use whole blocks only")
            if sublayer.kind != "mlp":
                attentions[sublayer.kind] = _inside(sublayer.module, block.path)
    return stack.name, stack.path, stack.counters[0].owner, attentions, cuts


def _inside(path: str, block: str) -> str:
    return path.removeprefix(f"{block}.")


def auto_classes(config: Any, stock: str) -> list[str]:
    """The ``AutoModel...`` classes under which transformers itself finds the class ``stock`` for this config."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    found = []
    for name, auto in vars(modeling_auto).items():
        if name.startswith("AutoModel") and isinstance(auto, type) and issubclass(auto, _BaseAutoModelClass):
            mapping: Any = vars(auto)["_model_mapping"]
            classes = mapping.get(type(config), ())
            if stock in {cls.__name__ for cls in (classes if isinstance(classes, tuple) else (classes,))}:
                found.append(name)
    return sorted(found)
