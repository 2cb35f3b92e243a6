"""The tables and the advice at the end of a comparison."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from billhook.plan.comparison import Comparison, Entry
from billhook.report.comparison import budget_in_words, exact_answers, passes, repeated
from billhook.report.figures_comparison import kept, name
from billhook.report.numbers import number, percent
from billhook.report.recommendation import recommendation


def tables(comparison: Comparison) -> list[Table]:
    """One a budget: every method, the least damage on top."""
    return [_table(comparison, budget) for budget in comparison.budgets if comparison.at(budget)]


def row(entry: Entry) -> tuple[str, ...]:
    """One result as it comes in: method, budget, damage, exact answers, work of the search; or why there is none."""
    drawn = entry.baseline and entry.recipe.startswith("random")
    who = f"{entry.recipe} (seed {entry.seed})" if drawn else entry.recipe
    if entry.refused:
        return who, entry.asked, entry.refused
    cut = f" ({number(entry.damage_as_cut)} cut)" if entry.healed else ""
    return who, entry.asked, f"{number(entry.damage)}{cut}", exact_answers(entry), f"{entry.work:,}"


def advice(comparison: Comparison, out: Path) -> Text:
    """The recommendation, and where the page is."""
    page = Text.assemble((str(out / "comparison.html"), "bold"), ("  the pictures; open it in a browser", "dim"))
    return Text("\n\n").join([Text("\n".join(recommendation(comparison))), page])


def _table(comparison: Comparison, budget: str) -> Table:
    entries = comparison.at(budget)
    figures = f"perplexity × dense, {'as cut' if comparison.heal == 'none' else 'cut → healed'}"
    table = Table(
        title=Text.assemble((f"keeping {budget_in_words(budget)}", "bold"), (f"  {figures}", "dim")),
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        header_style="dim",
    )
    table.add_column("method", no_wrap=True)
    table.add_column("kept", justify="right")
    for text in entries[0].evidence:
        table.add_column(Text(text.name), justify="right", overflow="fold")
    table.add_column("exact\nanswers", justify="right")
    table.add_column("repeated\n4-grams", justify="right")
    table.add_column("search\npasses", justify="right")
    for entry in entries:
        ratios = []
        for i, text in enumerate(entry.evidence):
            healed = f" → {number(entry.healed[i].perplexity_ratio.value)}" if entry.healed else ""
            ratios.append(f"{number(text.perplexity_ratio.value)}{healed}")
        style = "dim" if entry.baseline else ""
        found = [*ratios, exact_answers(entry), repeated(entry), number(passes(entry, comparison), 2)]
        cells = [name(entry, comparison), percent(kept(entry)), *found]
        table.add_row(*(Text(cell) for cell in cells), style=style)
    return table
