"""The model as drawn: a column a stack, a row a block, a cell a sublayer, with what a plan leaves of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from billhook.plan.address import Address
from billhook.plan.outline import Outline, StackOutline
from billhook.plan.plan import Factorise, HiddenChannels, Keep, Sparsify
from billhook.plan.record import Run
from billhook.plan.visits import shared
from billhook.report.cuts import dropped, zeros_in
from billhook.report.numbers import quantity

TALLEST, GAP = 760, 2  # pixels of a whole column, where rows can still grow thinner, and between two rows


@dataclass(frozen=True)
class Cell:
    """One sublayer, ``width`` percent of the widest block's parameters; ``left`` percent of its own if it got
    narrower; ``shared`` if it runs with the weights of another one."""

    kind: str
    width: float
    cut: bool
    title: str
    left: float | None = None
    shared: bool = False


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


def columns(run: Run) -> list[Column]:
    """The model as drawn: one column a stack."""
    drops = dropped(run)
    lefts = left_of(run.outline, run.plan.keeps, run.plan.sparsities, run.plan.factors, run.plan.channels)
    tied = shared(run.plan, run.outline)
    return [_column(stack, drops, lefts, tied) for stack in run.outline.stacks]


def _column(
    stack: StackOutline, drops: frozenset[Address], lefts: Mapping[Address, float], tied: Mapping[Address, Address]
) -> Column:
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
            left = lefts.get(address)
            title += f", {left}% left" if left is not None else ""
            leader = tied.get(address.parent)
            title += f", with the weights of {leader}" if leader else ""
            width = round(100 * sublayer.params / widest, 2)
            cells.append(Cell(kind, width, cut, title, left, leader is not None))
        rows.append(Row(str(i) if i % every == 0 else "", Address(stack.name, i) in drops, tuple(cells)))
    return Column(stack.name, height, tuple(rows))


def is_cut(unit: Address, drops: frozenset[Address]) -> bool:
    """Is this unit, or the block it lies in, removed?"""
    return unit in drops or unit.parent in drops


def left_of(
    outline: Outline,
    keeps: Iterable[Keep],
    sparsities: Iterable[Sparsify],
    factors: Iterable[Factorise],
    channels: Iterable[HiddenChannels] = (),
) -> dict[Address, float]:
    """Percent of its parameters that a sublayer keeps, of those that get narrower, lose rank or read a narrower stream;
    of those that only lose single weights, how many are not zero."""
    sublayers = dict(outline.sublayers())
    nonzero = {e.unit: round(100 * (1 - zeros_in(e) / max(sublayers[e.unit].params, 1)), 1) for e in sparsities}
    left = {k.unit: sublayers[k.unit].narrowed(k.inner, len(k.indices)) for k in keeps}
    for edit in factors:
        left[edit.unit] = left.get(edit.unit, sublayers[edit.unit]).factorised(edit.linear, edit.rank)
    for stack in channels:
        gone = outline.stack(stack.stack).hidden_size - len(stack.indices)
        left |= {a: left.get(a, whole).thinned(gone) for a, whole in sublayers.items() if a.stack == stack.stack}
    return nonzero | {unit: round(100 * now.params / sublayers[unit].params, 1) for unit, now in left.items()}
