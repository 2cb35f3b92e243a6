"""What was cut, what the model writes now, and where to look."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from billhook.cli.output import printable
from billhook.plan.record import Generation, Run
from billhook.report import healing
from billhook.report.cuts import dropped, ranks, sharing, thinned, widths, zeros
from billhook.report.loading import FOLDER, loading
from billhook.report.numbers import duration, percent, ranges
from billhook.report.palette import kind_name
from billhook.report.provenance import searched_now

_FILES = {
    "report.html": "the pictures; open it in a browser",
    "README.md": "the model card",
    "billhook.json": "the plan, and all that was measured",
    "billhook.arrays": "the masks or bases of the plan",
}


def cut(run: Run) -> Table:
    """Asked, realised, what was cut, which weights have no place in the model, what healing brought, and what it took,
    a line each."""
    asked = run.asked or run.plan.budget or ""
    kinds = [part.partition("=")[0].strip() for part in asked.split(",")]
    kinds = [kind for kind in kinds if kind in run.realised] or ["params"]  # until=cliff names none
    kept = {kind: share for kind, share in run.realised.items() if kind in kinds}  # the others stand in the table
    way = "act" if run.healing and run.healing.combined else "healed"
    rows = {
        "asked": asked,
        "realised": ", ".join(f"{percent(share)} of {kind}" for kind, share in kept.items()),
        "cut": cut_line(run),
        "left out": run.environment.get("weights left out", ""),
        "target": str(run.plan.target),
        way: "\n".join(filter(None, (healing.sentence(run), healing.away(run)))),
        "took": _took(run),
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))
    return table


def cut_line(run: Run) -> str:
    """``attention 3 7 11–13 · MLP 22 · blocks 25–27``; the stack is named where there are several."""
    groups: dict[tuple[str, str], list[int]] = {}
    for address in sorted(dropped(run), key=lambda a: (a.stack, a.sublayer is None, a.sublayer or "", a.block)):
        groups.setdefault((address.stack, address.sublayer or "block"), []).append(address.block)
    several = len(run.outline.stacks) > 1
    parts = []
    for (stack, kind), blocks in groups.items():
        name = "blocks" if kind == "block" and len(blocks) > 1 else kind_name(kind)
        parts.append(f"{stack + ' ' if several else ''}{name} {ranges(blocks).replace(',', '')}")
    details = (*sharing(run.plan, run.outline), *widths(run), *thinned(run), *zeros(run), *ranks(run))
    parts += [f"{what} {where}" for what, where in details]
    return " · ".join(parts) or "nothing"


def side_by_side(generation: Generation) -> Table:
    """One prompt, and what each model makes of it."""
    table = Table(
        title=Text(printable(generation.prompt.strip()), style="italic"),
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
        header_style="dim",
    )
    table.add_column("dense", width=37)
    table.add_column("compressed", width=37)
    table.add_row(*(Text(printable(text.strip())) for text in (generation.dense, generation.compressed)))
    return table


def where_to_look(run: Run, out: Path) -> Text:
    """The files for people, and how to load the result."""
    code = Text(loading(run).code.replace(FOLDER, str(out)), style="cyan")
    return Text("\n\n").join([part for part in (files(out), code) if part])


def files(out: Path) -> Text:
    """What lies in a result for people, a line a file."""
    lines = [
        Text.assemble((str(out / name), "bold"), (f"  {what}", "dim"))
        for name, what in _FILES.items()
        if (out / name).is_file()
    ]
    return Text("\n").join(lines)


def _took(run: Run) -> str:
    """``5 min 32 s, the search 4,331,520 block-token forwards``; the search of an earlier run took nothing now."""
    parts = [duration(sum(run.seconds.values()))] if run.seconds else []
    search = run.search if searched_now(run) else None
    parts += [f"the search {search.work:,} block-token forwards"] if search and search.work else []
    return ", ".join(parts)
