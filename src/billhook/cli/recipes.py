"""``billhook recipes``: the methods by name."""

from __future__ import annotations

from textwrap import fill
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from billhook.cli import options
from billhook.cli.output import print_json, print_views

if TYPE_CHECKING:
    from billhook.recipes.schema import Recipe

recipes = typer.Typer(name="recipes", invoke_without_command=True, rich_markup_mode="rich")

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME|FILE",
        show_default=False,
        autocompletion=options.recipe_names,
        help="A name that the list has, or a YAML file.",
    ),
]


@recipes.callback()
def listed(ctx: typer.Context, as_json: options.Json = False) -> None:
    """List the methods: paper, what they drop, need and cost; [bold]show NAME[/] prints and explains one.

    [dim]Example:[/] billhook recipes show sublayer-greedy
    """
    if ctx.invoked_subcommand is not None:
        return
    from billhook.recipes import catalogue, words

    found = catalogue.recipes()
    if as_json:
        rows = [
            {**recipe.model_dump(mode="json"), "needs": words.needs(recipe), "passes": words.passes(recipe)}
            for recipe in found
        ]
        print_json({"recipes": rows})
        return
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for heading in ("name", "paper", "units", "needs", "passes"):
        table.add_column(heading, no_wrap=heading != "passes", style="bold" if heading == "name" else "")
    for recipe in found:
        table.add_row(recipe.name, Text(_short(recipe)), recipe.unit, words.needs(recipe), words.passes(recipe))
    default = (
        f"The default: the first of {' and '.join(catalogue.DEFAULTS)} that can meet the budget; for target uniform "
    )
    default += f"{' and '.join(catalogue.DEFAULTS_UNIFORM)}."
    notes = [fill(note, 80) for note in (default, words.NEEDS, words.PASSES)]
    print_views(table, Text("\n".join(notes), style="dim"))


def _short(recipe: Recipe) -> str:
    """Authors and year: ``Zhang et al. 2024``; nothing without a paper."""
    authors = recipe.paper.citation.partition(",")[0] if recipe.paper else ""
    return authors.replace(" and ", ", ").replace("(", "").replace(")", "")


@recipes.command()
def show(ctx: typer.Context, name: Name, as_json: options.Json = False) -> None:
    """Print the YAML of a recipe, to start one of your own from, and what its words mean as comments below.

    [dim]Example:[/] billhook recipes show sublayer-greedy > own.yaml
    """
    from billhook.recipes import catalogue, words

    recipe = catalogue.load(name)
    if as_json or (ctx.parent is not None and ctx.parent.params["as_json"]):
        print_json(recipe.model_dump(mode="json"))
    else:
        typer.echo(catalogue.source_of(name))
        for word, meaning in words.explained(recipe).items():
            typer.echo(fill(f"{word}: {meaning}", 80, initial_indent="# ", subsequent_indent="#   "))
