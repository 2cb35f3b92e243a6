"""``billhook policies``: the ways to run a model, by name."""

from __future__ import annotations

import inspect
from textwrap import fill
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from billhook.cli import options
from billhook.cli.output import comparison_json, print_json, print_views
from billhook.cli.progress import bars

policies = typer.Typer(name="policies", invoke_without_command=True, rich_markup_mode="rich")

Name = Annotated[str, typer.Argument(metavar="NAME", show_default=False, help="A name that the list has.")]


@policies.callback()
def listed(ctx: typer.Context, as_json: options.Json = False) -> None:
    """List the ways to leave something out while a model runs: what each does, its paper, what becomes of keys and
    values, and the parameter that [bold]billhook tune-policy[/] turns.

    For --policy of generate, bench, tune-policy and [bold]policies compare[/]; [bold]policies explain NAME[/] explains
    one and its parameters.

    [dim]Example:[/] billhook policies explain ffn-skip
    """
    if ctx.invoked_subcommand is not None:
        return
    from billhook.recipes.words import sentences
    from billhook.runtime.catalogue import POLICIES

    if as_json:
        print_json({"policies": [_facts(name) for name in POLICIES]})
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, policy in POLICIES.items():
        dial = f"tuned by {policy.dial[0]}" if policy.dial else ""
        more = (policy.paper, f"keys and values: {policy.kv}", dial)
        details = Text("\n" + "\n".join(line for line in more if line), style="dim")
        table.add_row(name, Text(sentences(policy)) + details)
    print_views(table)


@policies.command()
def explain(ctx: typer.Context, name: Name, as_json: options.Json = False) -> None:
    """Explain a policy: what it does, its source, what becomes of keys and values, and its parameters.

    [dim]Example:[/] billhook policies explain similarity-exit
    """
    from billhook.runtime.catalogue import named

    policy = named(name)
    if as_json or (ctx.parent is not None and ctx.parent.params["as_json"]):
        print_json(_facts(name))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for heading in ("parameter", "default", "allowed"):
        table.add_column(heading)
    for parameter, schema in policy.model_json_schema()["properties"].items():
        table.add_row(parameter, Text(repr(policy.model_fields[parameter].default)), Text(_allowed(schema)))
    print_views(Text(_wrapped(inspect.getdoc(policy) or "")), table)


def _wrapped(docstring: str) -> str:
    """Paragraphs at 80 columns; formulas, which are indented, as they are."""
    paragraphs = docstring.replace("``", "").split("\n\n")
    return "\n\n".join(p if p.startswith(" ") else fill(" ".join(p.split()), 80) for p in paragraphs)


def _allowed(schema: dict[str, Any]) -> str:
    """``1 to 4``, ``1 or more``, ``above 0``, the words; empty where the parameter is something else."""
    if "enum" in schema:
        return " or ".join(schema["enum"])
    if "exclusiveMinimum" in schema:
        return f"above {schema['exclusiveMinimum']:g}"
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is None:
        return ""
    return f"{low:g} or more" if high is None else f"{low:g} to {high:g}"


_BUDGETS = "A generated token's work or cache, as shares of the plain model's: flops=0.9,0.8,kv_bytes=0.5."
_TAKING_PART = (
    "A policy to take part: NAME, NAME:parameter=value,... or a .json file; give it again for more. "
    "If not given: static-skip, ffn-skip, neuron-experts, voids, similarity-exit, lora-drop, first-router, "
    "mixture-of-depths, kv-share and self-speculation."
)


@policies.command(no_args_is_help=True)
def compare(
    model: options.Model,
    out: options.Out,
    policy: Annotated[
        list[str] | None, typer.Option(metavar="NAME|FILE", show_default=False, help=_TAKING_PART)
    ] = None,
    budget: Annotated[str, typer.Option(metavar="flops=NUMBER,...", help=_BUDGETS)] = "flops=0.9,0.8,0.7",
    calibration: options.Calibration = "builtin",
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    seed: options.Seed = 0,
    dtype: options.Dtype = options.DtypeName.AUTO,
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Run MODEL under several policies at each amount of work, and say which costs least for the time that it saves.

    DIR gets comparison.html and comparison.json. The plain model and blocks skipped evenly and at random always take
    part. Dials are turned on your text, to the budgets of what a policy spares (work; cache for kv-share, which without
    a kv_bytes budget runs as it is given); everything is judged on other text, by perplexity and by exact answers.
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
        print_json(comparison_json(result, out))
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
