"""A comparison of policies for people: a table that grows while it runs, and the advice at its end."""

from __future__ import annotations

import sys
from pathlib import Path

import typer
from rich.text import Text

from billhook.cli.output import printable
from billhook.plan.policy_comparison import PolicyComparison, PolicyEntry
from billhook.report.numbers import number, percent
from billhook.report.policy_recommendation import policy_recommendation

_HEADINGS = f"{'policy':<24} {'asked':<12} {'FLOPs':>6} {'cache':>6} {'faster':>7} {'perplexity':>11} {'exact':>7}"


class LiveTable:
    """One aligned line an entry on standard error, as soon as it is measured; the bars stay below it."""

    def __init__(self) -> None:
        self._begun = False

    def __call__(self, entry: PolicyEntry) -> None:
        if not self._begun:
            typer.echo(_HEADINGS, file=sys.stderr)
        self._begun = True
        typer.echo(printable(line(entry)), file=sys.stderr)


def line(entry: PolicyEntry) -> str:
    """The figures of an entry, or why there are none."""
    name = f"{entry.name:<24} {entry.asked or 'as given':<12}"
    if entry.refused:
        return f"{name} {entry.refused}"
    saved = entry.savings
    flops, cache = (percent(saved.flops), percent(saved.kv_bytes)) if saved else ("–", "–")
    exact = percent(entry.exact) if entry.exact is not None else "as plain"
    return f"{name} {flops:>6} {cache:>6} {entry.speedup:>6.2f}× {number(entry.damage):>10}× {exact:>7}"


def advice(comparison: PolicyComparison, out: Path) -> Text:
    """The recommendation, and where the page is."""
    page = Text.assemble((str(out / "comparison.html"), "bold"), ("  the pictures; open it in a browser", "dim"))
    return Text("\n\n").join([Text("\n".join(policy_recommendation(comparison))), page])


def table(comparison: PolicyComparison) -> Text:
    """All entries, by budget and then by damage."""
    rows = [line(entry) for budget in (*comparison.budgets, "") for entry in comparison.at(budget)]
    return Text("\n".join([_HEADINGS, *(printable(row) for row in rows)]))
