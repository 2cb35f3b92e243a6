"""What a plan removes, in words and as the drawing of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from billhook.plan.address import Address
from billhook.plan.check import normalise
from billhook.plan.outline import StackOutline
from billhook.plan.record import Run
from billhook.report.numbers import quantity, ranges
from billhook.report.palette import kind_name

TALLEST, GAP = 760, 2  # pixels of a whole column, where rows can still grow thinner, and between two rows


@dataclass(frozen=True)
class Cell:
    """One sublayer, ``width`` percent of the widest block's parameters; ``left`` percent of its own if it got
    narrower."""

    kind: str
    width: float
    cut: bool
    title: str
    left: float | None = None


@dataclass(frozen=True)
class Row:
    label: str
    cut: bool
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Column:
    """One stack, rows in order of execution, ``height`` pixels each."""

    stack: str
    height: int
    rows: tuple[Row, ...]


def dropped(run: Run) -> frozenset[Address]:
    """The removal in its shortest form."""
    return normalise(run.plan.drops, run.outline)


def is_cut(unit: Address, drops: frozenset[Address]) -> bool:
    """Is this unit, or the block it lies in, removed?"""
    return unit in drops or unit.parent in drops


def summary(run: Run) -> list[tuple[str, str]]:
    """What was cut, one line a stack and kind: ``("attention of decoder", "3, 11–13")``."""
    order = [stack.name for stack in run.outline.stacks]
    groups: dict[tuple[str, str], list[int]] = {}
    for address in sorted(dropped(run), key=lambda a: (order.index(a.stack), a.sublayer or "", a.block)):
        groups.setdefault((address.stack, address.sublayer or ""), []).append(address.block)
    several = len(run.outline.stacks) > 1
    gone = [
        ((f"{kind_name(kind)} of " if kind else "") + (f"{stack} " if several else "") + "blocks", ranges(blocks))
        for (stack, kind), blocks in groups.items()
    ]
    return [*gone, *((f"{what}s in blocks", f"{ranges(blocks)}: {n:,}") for what, n, blocks in _narrower(run))]


def _narrower(run: Run) -> list[tuple[str, int, list[int]]]:
    """For each kind of inner unit: how many were cut, and from which blocks."""
    sublayers = dict(run.outline.sublayers())
    found: dict[str, tuple[int, list[int]]] = {}
    for keep in run.plan.keeps:
        gone = sublayers[keep.unit].inner[keep.inner].count - len(keep.indices)
        number, blocks = found.get(keep.inner, (0, []))
        found[keep.inner] = number + gone, [*blocks, keep.unit.block]
    names = {"group": "KV group"}
    return [(names.get(kind, kind), number, sorted(blocks)) for kind, (number, blocks) in sorted(found.items())]


def parts(run: Run) -> list[tuple[str, str]]:
    """What the dense model consists of, a line for each stack and kind: ``("MLP", "30 of them, 80 M parameters")``."""
    several = len(run.outline.stacks) > 1
    sizes: dict[tuple[str, str], list[int]] = {}
    for address, sublayer in run.outline.sublayers():
        sizes.setdefault((address.stack, address.sublayer or ""), []).append(sublayer.params)
    lines = [
        (
            (f"{stack} " if several else "") + kind_name(kind),
            f"{len(found)} of them, {quantity(sum(found), 'parameters')}",
        )
        for (stack, kind), found in sizes.items()
    ]
    return [*lines, ("outside the blocks", quantity(run.outline.other_params, "parameters"))]


def counts(run: Run) -> str:
    """``5 of 30 blocks, 3 attentions and 2 MLPs``, ``1,200 neurons``; empty where nothing was cut."""
    found = Counter(a.sublayer or "block" for a in dropped(run))
    total = sum(1 for _ in run.outline.blocks())
    parts = [f"{found.pop('block')} of {total} blocks"] if "block" in found else []
    parts += [f"{n} {kind_name(kind)}{'s' if n > 1 else ''}" for kind, n in sorted(found.items())]
    parts += [f"{n:,} {what}{'s' if n > 1 else ''}" for what, n, _ in _narrower(run)]
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def columns(run: Run) -> list[Column]:
    """The model as drawn: one column a stack."""
    drops = dropped(run)
    sublayers = dict(run.outline.sublayers())
    narrower = {k.unit: sublayers[k.unit].narrowed(k.inner, len(k.indices)).params for k in run.plan.keeps}
    return [_column(stack, drops, narrower) for stack in run.outline.stacks]


def _column(stack: StackOutline, drops: frozenset[Address], narrower: Mapping[Address, int]) -> Column:
    height = max(5, min(22, TALLEST // max(len(stack.blocks), 1) - GAP))
    every = 1 if height >= 13 else 5 if height >= 7 else 10
    widest = max((sum(s.params for s in b.sublayers.values()) for b in stack.blocks), default=0) or 1
    rows = []
    for i, block in enumerate(stack.blocks):
        cells = []
        for kind, sublayer in block.sublayers.items():
            address = Address(stack.name, i, kind)
            cut = is_cut(address, drops)
            title = f"{address}: {quantity(sublayer.params, 'parameters')}{', cut' if cut else ''}"
            left = round(100 * narrower[address] / sublayer.params, 1) if address in narrower else None
            title += f", {left}% left" if left is not None else ""
            cells.append(Cell(kind, round(100 * sublayer.params / widest, 2), cut, title, left))
        rows.append(Row(str(i) if i % every == 0 else "", Address(stack.name, i) in drops, tuple(cells)))
    return Column(stack.name, height, tuple(rows))
