"""What a model consists of, and how much each part matters."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from billhook.plan.address import SUBLAYERS, Address
from billhook.plan.outline import StackOutline
from billhook.plan.record import Run
from billhook.report.audit import parts
from billhook.report.figures import complexity_sentence
from billhook.report.numbers import quantity
from billhook.report.palette import kind_name

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 40  # blocks on one line
_LEAST = 4


def model(run: Run) -> Table:
    """A line a stack: how many blocks, what is in them and how large they are."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for name, justify in (("stack", "left"), ("blocks", "right"), ("each with", "left"), ("parameters", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for stack in run.outline.stacks:
        kinds = dict.fromkeys(kind_name(kind) for block in stack.blocks for kind in block.sublayers)
        size = sum(block.params for block in stack.blocks)
        table.add_row(stack.name, str(len(stack.blocks)), ", ".join(kinds), quantity(size, "").strip())
    table.add_row(Text("outside the blocks", style="dim"), "", "", quantity(run.outline.other_params, "").strip())
    return table


def importance(run: Run) -> Table:
    """For every score a line of bars, one bar a block; the taller, the more important. Beside it the blocks that matter
    least, the least first.

    Heights are ranks among all units of the score: the first and last block often matter a hundred times more than
    the rest, which would be flat otherwise. Units that the calibration never reached are dots.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    title = ""
    for score, values in (run.measures.scores if run.measures else {}).items():
        before, title = title, score.partition(", ")[0]  # the same over blocks and over sublayers stands together
        if title != before:
            if before:
                table.add_row()
            table.add_row(Text(title.replace("_", " ").replace("-", " "), style="bold not dim"))
        for stack in run.outline.stacks:
            for kind in ("block", *SUBLAYERS):
                name = kind_name(kind) if len(run.outline.stacks) == 1 else f"{stack.name} {kind_name(kind)}"
                for row in _lines(stack, kind, values):
                    table.add_row(name, *row)
                    name = ""
    return table


def complexity(run: Run) -> Text:
    """What the neurons of MLPs have in common, in words."""
    return Text(complexity_sentence(run))


def audit(run: Run) -> Table:
    """What the depth audit says, a topic a row; the pictures are on the page."""
    table = Table(box=None, padding=(0, 2, 1, 0), pad_edge=False, show_header=False)
    table.add_column(style="dim", max_width=24)
    table.add_column()
    for part in parts(run):
        table.add_row(Text(part.title), Text(part.says))
    return table


def _lines(stack: StackOutline, kind: str, values: dict[str, float]) -> Iterator[tuple[str, str]]:
    """Bars, forty blocks a line, the least important named on the first; nothing where this kind has no values."""
    order = sorted(values.values())
    units = [str(Address(stack.name, i, None if kind == "block" else kind)) for i in range(len(stack.blocks))]
    known = [i for i, unit in enumerate(units) if unit in values]
    bars = "".join(_bar(values[unit], order) if unit in values else "·" for unit in units)
    lowest = sorted(known, key=lambda i: (values[units[i]], i))[:_LEAST]
    note = f"least {' '.join(map(str, lowest))}"
    for start in range(0, len(bars) if known else 0, _WIDTH):
        yield bars[start : start + _WIDTH], "" if start else note


def _bar(value: float, order: list[float]) -> str:
    return _BARS[order.index(value) * len(_BARS) // len(order)]
