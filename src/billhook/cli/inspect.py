"""``billhook inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType

from billhook.cli import options
from billhook.cli.output import print_json, print_views, run_json
from billhook.cli.progress import bars

_OUT = "Also audit the depth, and write report.html and billhook.json there: a new folder. Takes minutes."


def inspect(
    model: options.Model,
    out: Annotated[Path | None, typer.Option(metavar="DIR", show_default=False, help=_OUT)] = None,
    calibration: options.Calibration = "builtin",
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    seed: options.Seed = 0,
    dtype: options.Dtype = options.DtypeName.AUTO,
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Show what MODEL consists of and how much each block and sublayer matters.

    One bar a block, from the first to the last; the taller, the more important. With [bold]--out[/] also how the model
    uses its depth: what skipping a block does to later ones and to the output, how far affine maps between depths
    reach, what blocks do token by token; and how many neurons of MLPs compute nearly the same.

    [dim]Example:[/] billhook inspect demo --out out/inspect
    """
    with bars() as progress:
        from billhook.recipes.inspect import inspect as walk

        run = walk(
            model,
            out=out,
            calibration=calibration,
            seed=seed,
            dtype=dtype.chosen,
            device=device,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json(run_json(run, out))
        return
    from billhook.cli import inspection, views

    files = [views.files(out)] if out else []
    audited: list[RenderableType] = [inspection.complexity(run), inspection.audit(run)] if run.audits else []
    print_views(inspection.model(run), inspection.importance(run), *audited, *files)
