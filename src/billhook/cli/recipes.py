"""``billhook recipes``: the methods by name."""

from __future__ import annotations

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
    """List the methods with their papers; [bold]show NAME[/] prints one.

    [dim]Example:[/] billhook recipes show sublayer-greedy
    """
    if ctx.invoked_subcommand is not None:
        return
    from billhook.recipes import catalogue

    if as_json:
        print_json({"recipes": [recipe.model_dump(mode="json") for recipe in catalogue.recipes()]})
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for recipe in catalogue.summaries():
        default = "  (default)" if recipe["name"] == catalogue.DEFAULT else ""
        table.add_row(recipe["name"], Text.assemble(recipe["title"], (default, "dim")))
        if "paper" in recipe:
            table.add_row("", Text(recipe["paper"]["citation"], style="dim"))
    print_views(table)


@recipes.command()
def show(name: Name, as_json: options.Json = False) -> None:
    """Print the YAML of a recipe, to start one of your own from.

    [dim]Example:[/] billhook recipes show sublayer-greedy > own.yaml
    """
    from billhook.recipes import catalogue

    source = catalogue.source_of(name)
    if as_json:
        print_json(catalogue.load(name).model_dump(mode="json"))
    else:
        typer.echo(source, nl=False)
