"""What goes to standard output: one JSON object, or what people read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, RenderableType
from rich.text import Text

if TYPE_CHECKING:
    from pydantic import BaseModel

    from billhook.plan.record import Run

_FILES = {"report": "report.html", "card": "README.md", "record": "billhook.json", "arrays": "billhook.arrays"}


def print_json(content: dict[str, Any]) -> None:
    """The one JSON object, on one line."""
    typer.echo(json.dumps(content, ensure_ascii=False, allow_nan=False))


def run_json(run: Run, out: Path | None = None) -> dict[str, Any]:
    """The record of a run, with two things added: ``block_token_forwards``, the work of its search, and ``paths``."""
    record = json.loads(run.model_dump_json())  # by pydantic, which writes NaN as null
    return {**record, "block_token_forwards": run.search.work if run.search else 0, "paths": paths(out)}


def comparison_json(found: BaseModel, out: Path) -> dict[str, Any]:
    """The record of a comparison, and in ``paths`` where its page and that record are."""
    paths = {name: str(out.absolute() / f"comparison.{name}") for name in ("html", "json")}
    return {**json.loads(found.model_dump_json()), "paths": paths}


def paths(out: Path | None) -> dict[str, str]:
    """The absolute path of the folder that was written, and of what lies in it for people; empty for None."""
    if out is None:
        return {}
    found = {name: out.absolute() / file for name, file in _FILES.items()}
    return {"out": str(out.absolute())} | {name: str(path) for name, path in found.items() if path.is_file()}


def printable(text: str) -> str:
    """The text without control characters, which what a model writes or a stranger's file holds could steer a terminal
    with; line ends and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def print_views(*views: RenderableType) -> None:
    """What people read, with a blank line between the parts. Plain text is never wrapped, so that it can be copied."""
    console = Console(highlight=False, markup=False, emoji=False)
    for number, view in enumerate(views):
        if number:
            console.print()
        console.print(view, soft_wrap=isinstance(view, Text))
