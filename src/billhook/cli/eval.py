"""``billhook eval``."""

from __future__ import annotations

from typing import Annotated

import typer

from billhook.cli import options
from billhook.cli.output import print_json, print_views, run_json
from billhook.cli.progress import bars

_AGAINST = "The dense model to compare with, on the same text in the same run."


def evaluate(
    folder: options.Folder,
    against: Annotated[str | None, typer.Option(metavar="MODEL", show_default=False, help=_AGAINST)] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="SOURCE", show_default=False, help=options.CALIBRATION_HELP)
    ] = None,
    as_json: options.Json = False,
    seed: options.Seed = 0,
    dtype: options.Dtype = options.DtypeName.AUTO,
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Measure the perplexity of DIR and, against a MODEL, how far it is from that.

    On two texts: the part of SOURCE that calibration never sees, and a text of another kind.

    [dim]Example:[/] billhook eval out/demo --against demo
    """
    with bars() as progress:
        from billhook.recipes.evaluate import evaluate as walk

        run = walk(
            folder,
            against=against,
            calibration=calibration,
            seed=seed,
            dtype=dtype.chosen,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json(run_json(run))
        return
    from billhook.cli import tables, views

    if against is None:
        print_views(tables.single(run))
    else:
        written = [views.side_by_side(generation) for generation in run.generations[:1]]
        print_views(tables.compared(run), *written)
