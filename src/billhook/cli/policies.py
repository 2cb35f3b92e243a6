"""``billhook policies``: the ways to run a model, by name."""

from __future__ import annotations

import inspect
import json
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from billhook.cli import options
from billhook.cli.output import print_json, print_views
from billhook.cli.progress import bars

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


_WORK = "The work of a generated token, as shares of the plain model's: flops=0.9,0.8,0.7."
_TAKING_PART = (
    "A policy to take part: NAME, NAME:parameter=value,... or a .json file; give it again for more. Those that come "
    "along, if not given."
)


@policies.command(no_args_is_help=True)
def compare(
    model: options.Model,
    out: options.Out,
    policy: Annotated[
        list[str] | None, typer.Option(metavar="NAME|FILE", show_default=False, help=_TAKING_PART)
    ] = None,
    budget: Annotated[str, typer.Option(metavar="flops=NUMBER,...", help=_WORK)] = "flops=0.9,0.8,0.7",
    calibration: options.Calibration = "builtin",
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    seed: options.Seed = 0,
    dtype: options.Dtype = options.DtypeName.AUTO,
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Run MODEL under every policy at each amount of work, and say which costs least for the time that it saves.

    DIR gets comparison.html and comparison.json. The plain model and blocks skipped evenly and at random always take
    part. Dials are turned on your text, everything is judged on other text, by perplexity and by exact answers.
    An interrupted run continues where it was when the same command is given again.

    [dim]Example:[/] billhook policies compare demo --budget flops=0.9,0.8 --out out/policies
    """
    from billhook.cli.policy_comparison import LiveTable, advice, table

    with bars() as progress:
        from billhook.recipes.compare_policies import compare_policies

        result = compare_policies(
            model,
            out=out,
            budgets=budget,
            policies=policy or (),
            calibration=calibration,
            seed=seed,
            dtype=dtype.chosen,
            device=device,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
            told=LiveTable(),
        )
    if as_json:
        paths = {name: str(out.absolute() / f"comparison.{name}") for name in ("html", "json")}
        print_json({**json.loads(result.model_dump_json()), "paths": paths})
        return
    print_views(table(result), advice(result, out))


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
