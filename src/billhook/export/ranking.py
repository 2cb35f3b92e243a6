"""The part of a heterogeneous checkpoint's Python file that puts two linears in the place of one, or behind a block."""

from __future__ import annotations

import inspect
from pprint import pformat
from string import Template
from typing import Any

from billhook.anatomy import Anatomy
from billhook.anatomy.bridge import BRIDGE, across, build_bridge
from billhook.anatomy.low_rank import LowRank
from billhook.anatomy.low_rank_experts import LowRankExperts
from billhook.anatomy.vocabulary import DOWN, GATE_UP
from billhook.surgery.form import Form

_SPLIT = Template('''\
$low_rank

# one row a stack: name, path of its blocks, of its config, channels of its stream
RANKS: Any = $rows


def split(model: nn.Module, name: str, path: str, owner: str, width: int) -> None:
    """Put two linears in the place of each that the config gives a rank."""
    listed = getattr(reduce(getattr, owner.split("."), model), "linear_ranks", {}).get(name, {})
    for index, linears in listed.items():
        block = model.get_submodule(f"{path}.{index}")
        for inside, rank in linears.items():$bridge
            old: Any = block.get_submodule(inside)$experts
            outputs, inputs = reversed(old.weight.shape) if type(old).__name__ == "Conv1D" else old.weight.shape
            block.set_submodule(inside, LowRank(inputs, rank, outputs, old.bias is not None))''')


_EXPERTS = f"""
            if hasattr(old, "{GATE_UP}"):
                block.set_submodule(inside, LowRankExperts(*old.{DOWN}.shape, rank, old.act_fn))
                continue"""


_BRIDGE = """
            if inside == BRIDGE:
                build_bridge(block, width, rank)
                continue"""


def splitting(anatomy: Anatomy, form: Form) -> str:
    """The source; ``anatomy`` is that of the stock class."""
    used = {block.stack for block, _ in form.ranks}
    width = {stack.name: stack.hidden_size for stack in anatomy.outline.stacks}
    rows = [(s.name, s.path, s.counters[0].owner, width[s.name]) for s in anatomy.stacks if s.name in used]
    outlines = dict(anatomy.outline.blocks())
    apart = any(path in part.mixtures for block, path in form.ranks for part in outlines[block].sublayers.values())
    bridged = any(path == BRIDGE for _, path in form.ranks)
    own: tuple[Any, ...] = (LowRank, *([LowRankExperts] if apart else []), *([build_bridge, across] if bridged else []))
    sources = [inspect.getsource(part) for part in own]
    if bridged:
        sources.append(f'BRIDGE = "{BRIDGE}"')
    return _SPLIT.substitute(
        low_rank="\n\n".join(sources),
        bridge=_BRIDGE if bridged else "",
        experts=_EXPERTS if apart else "",
        rows=pformat(rows, width=116, sort_dicts=False),
    )
