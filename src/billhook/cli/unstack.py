"""``billhook unstack``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from billhook.cli import options
from billhook.cli.output import paths, print_json

_STACK = "A folder that billhook stack wrote."
_BUDGET = "How much of it to read: bytes with their unit (size=100MB), or a share of it all (size=0.5)."


def unstack(
    stack: Annotated[str, typer.Argument(metavar="STACK", show_default=False, help=_STACK)],
    budget: Annotated[str, typer.Option(metavar="size=NUMBER", show_default=False, help=_BUDGET)],
    out: options.Out,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Make an ordinary checkpoint of as much of STACK as a budget allows, and write it to DIR.

    What is read is what has to be kept or sent; the weights in DIR are as wide as those of the model that was stacked.

    [dim]Example:[/] billhook unstack out/stack --budget size=120MB --out out/coarser
    """
    from billhook.recipes.stack import unstack as walk

    sizes = walk(stack, budget=budget, out=out, overwrite=overwrite)
    if as_json:
        print_json({"sizes": asdict(sizes), "paths": paths(out)})
        return
    from billhook.report.numbers import quantity

    read, whole = (quantity(size, "bytes") for size in (sizes.read, sizes.whole))
    typer.echo(f"{out}: an ordinary checkpoint, of {read} of {whole}")
