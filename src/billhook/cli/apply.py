"""``billhook apply``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from billhook.cli import options
from billhook.cli.progress import bars
from billhook.cli.results import show

_PLAN = "A plan: a JSON file, a billhook.json, or the folder of an earlier result."


def apply(
    model: options.Model,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", show_default=False, help=_PLAN)],
    out: options.Out,
    target: options.Target = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    seed: options.Seed = 0,
    dtype: options.Dtype = options.DtypeName.AUTO,
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Carry out PLAN on MODEL and write the smaller checkpoint to DIR.

    Weights are rewritten one tensor at a time, in the type they are stored in, without building the model: --seed,
    --dtype and --device change nothing here. Nothing is measured; [bold]billhook eval[/] and [bold]billhook bench[/]
    do that.

    [dim]Example:[/] billhook apply demo out/demo/billhook.json --out out/again
    """
    if dtype.chosen:
        typer.echo(f"billhook: note: apply keeps the type that the weights are stored in, not {dtype}", err=True)
    with bars() as progress:
        from billhook.recipes.apply import apply as walk

        run = walk(
            model,
            plan,
            out=out,
            target=target,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if lost := run.environment.get("not healed"):
        typer.echo(f"billhook: note: {lost}", err=True)
    show(run, out, as_json)
