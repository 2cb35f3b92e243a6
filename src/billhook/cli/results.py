"""What a command says in the end that has written a result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from billhook.cli.output import print_json, print_views, printable, run_json
from billhook.plan import processes

if TYPE_CHECKING:
    from billhook.plan.record import Run


def show(run: Run, out: Path, as_json: bool, told: str = "") -> None:
    """The record as JSON; or for people, behind what there is to be ``told`` first, the figures of both models, what
    was cut, one prompt, and where to look. Of several processes the first one speaks."""
    if not processes.is_first():
        return
    if as_json:
        print_json(run_json(run, out))
        return
    from billhook.cli import tables, views

    first = [Text(printable(told))] if told else []
    written = [views.side_by_side(generation) for generation in run.generations[:1]]
    print_views(*first, tables.compared(run), views.cut(run), *written, views.where_to_look(run, out))
