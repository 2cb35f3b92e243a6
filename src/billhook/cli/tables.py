"""The table of figures at the end of a run: dense beside compressed."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from billhook.plan.record import Interval, Quantity, Run
from billhook.report.answers import repetition
from billhook.report.headline import budget_name
from billhook.report.numbers import number, percent, points, quantity

NAME_WIDTH = 36
Row = tuple[str, str, str, str]  # name, dense, compressed, what that means


def compared(run: Run) -> Table:
    """Sizes, perplexity, divergence, exact answers, repetition and speed of both models; parts that were not
    measured are left out."""
    table = _table("dense", "compressed")
    for kind, cost in run.costs.items():
        table.add_row(*_plain(_cost(kind, cost)))
    parts = {
        "perplexity": list(_perplexity(run)),
        "divergence, nats per token": list(_divergence(run)),
        "exact answers, difference in points": list(_answers(run)),
        "repeated 4-grams": list(_repetition(run)),
        "tokens per second": list(_speed(run)),
    }
    for title, rows in parts.items():
        if rows:
            _section(table, title)
        for name, *rest in rows:
            table.add_row(*_plain((f"  {name}", *rest)))
    return table


def single(run: Run) -> Table:
    """The perplexity of one model that is compared with nothing."""
    table = _table("")
    _section(table, "perplexity")
    for text in run.evidence:
        found = text.perplexity_dense
        table.add_row(*_plain((f"  {text.name}", number(found.value), f"{number(found.low)} to {number(found.high)}")))
    return table


def _table(*figures: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=any(figures), header_style="dim")
    table.add_column("", no_wrap=True, overflow="ellipsis", width=NAME_WIDTH)
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True, style="bold" if name != "dense" else "")
    table.add_column("", no_wrap=True, style="dim", overflow="ellipsis")
    return table


def _section(table: Table, title: str) -> None:
    if table.row_count:
        table.add_row()
    table.add_row(Text(title, style="dim"))


def _plain(row: tuple[str, ...]) -> Iterator[Text]:
    return (Text(cell) for cell in row)


def _cost(kind: str, cost: Quantity) -> Row:
    name, unit = budget_name(kind), cost.unit
    if unit.startswith("bytes "):  # "per token" belongs to the name
        name, unit = f"{name} {unit.removeprefix('bytes ')}", "bytes"
    figures = [quantity(value, unit) for value in (cost.dense, cost.compressed)]
    if unit != "bytes":
        figures = [text.removesuffix(unit).strip() for text in figures]
    return name, figures[0], figures[1], percent(cost.compressed / cost.dense) if cost.dense else ""


def _perplexity(run: Run) -> Iterator[Row]:
    for text in run.evidence:
        dense, compressed = text.perplexity_dense, text.perplexity_compressed
        yield text.name, number(dense.value), number(compressed.value), _times(text.perplexity_ratio)


def _divergence(run: Run) -> Iterator[Row]:
    for text in run.evidence:
        yield text.name, "", number(text.kl.value), f"{percent(text.top1.value)} same next token"


def _answers(run: Run) -> Iterator[Row]:
    for probe in run.probes:
        yield probe.name, percent(probe.dense), percent(probe.compressed), points(probe.difference)


def _repetition(run: Run) -> Iterator[Row]:
    found = repetition(run.generations)
    if found is not None:
        yield "greedy continuations", percent(found[0]), percent(found[1]), ""


def _speed(run: Run) -> Iterator[Row]:
    for timing in run.timings:
        dense, compressed = timing.dense_tokens_per_second, timing.compressed_tokens_per_second
        yield timing.workload.name, number(dense), number(compressed), _times(timing.speedup)


def _times(ratio: Interval) -> str:
    return f"{number(ratio.value)}× ({number(ratio.low)}–{number(ratio.high)})"
