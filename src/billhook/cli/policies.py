"""``billhook policies``: the ways to run a model, by name."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from billhook.cli import options
from billhook.cli.output import print_json, print_views

policies = typer.Typer(name="policies", invoke_without_command=True, rich_markup_mode="rich")

Name = Annotated[str, typer.Argument(metavar="NAME", show_default=False, help="A name that the list has.")]


@policies.callback()
def listed(ctx: typer.Context, as_json: options.Json = False) -> None:
    """List the run-time policies: what they do, their paper and what becomes of keys and values; [bold]explain NAME[/]
    explains one.

    [dim]Example:[/] billhook policies explain ffn-skip
    """
    if ctx.invoked_subcommand is not None:
        return
    from billhook.runtime.catalogue import POLICIES

    if as_json:
        print_json({"policies": [_facts(name) for name in POLICIES]})
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for heading in ("name", "paper", "keys and values", "tuned by"):
        table.add_column(heading, style="bold" if heading == "name" else "")
    for name, policy in POLICIES.items():
        table.add_row(name, Text(policy.paper), Text(policy.kv), policy.dial[0] if policy.dial else "")
    print_views(table)


@policies.command()
def explain(ctx: typer.Context, name: Name, as_json: options.Json = False) -> None:
    """Explain a policy: what it does, its source, its rule for keys and values, and its parameters.

    [dim]Example:[/] billhook policies explain similarity-exit
    """
    from billhook.runtime.catalogue import named

    policy = named(name)
    if as_json or (ctx.parent is not None and ctx.parent.params["as_json"]):
        print_json(_facts(name))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for heading in ("parameter", "default"):
        table.add_column(heading)
    for parameter, field in policy.model_fields.items():
        table.add_row(parameter, Text(repr(field.default)))
    print_views(Text((inspect.getdoc(policy) or "").replace("``", "")), table)


def _facts(name: str) -> dict[str, object]:
    from billhook.runtime.catalogue import named

    policy = named(name)
    return {
        "name": name,
        "paper": policy.paper,
        "kv": policy.kv,
        "tuned_by": policy.dial[0] if policy.dial else None,
        "wants_text": policy.wants_text,
        "parameters": policy.model_json_schema()["properties"],
        "description": inspect.getdoc(policy),
    }
