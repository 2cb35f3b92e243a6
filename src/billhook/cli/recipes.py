"""``billhook recipes``: the methods by name."""

from __future__ import annotations

from textwrap import fill
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from billhook.cli import options
from billhook.cli.output import print_json, print_views

recipes = typer.Typer(name="recipes", invoke_without_command=True, rich_markup_mode="rich")

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", show_default=False, autocompletion=options.recipe_names, help="A name that the list has."
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
        print_json({"recipes": [recipe.model_dump(mode="json") for recipe in found]})
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for heading in ("name", "paper", "units", "needs", "passes"):
        table.add_column(heading, no_wrap=heading != "paper", style="bold" if heading == "name" else "")
    for recipe in found:
        paper = recipe.paper.citation.partition(",")[0] if recipe.paper else ""
        table.add_row(recipe.name, Text(paper), recipe.unit, words.needs(recipe), words.passes(recipe))
    default = (
        f"The default: the first of {' and '.join(catalogue.DEFAULTS)} that can meet the budget; for target uniform "
    )
    default += f"{' and '.join(catalogue.DEFAULTS_UNIFORM)}."
    print_views(table, Text(fill(f"{default} {words.PASSES}", 80), style="dim"))


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
        typer.echo(catalogue.source_of(recipe.name))
        for word, meaning in words.explained(recipe).items():
            typer.echo(fill(f"{word}: {meaning}", 80, initial_indent="# ", subsequent_indent="#   "))
