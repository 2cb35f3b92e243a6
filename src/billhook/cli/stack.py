"""``billhook stack``."""

from __future__ import annotations

from dataclasses import asdict

import typer

from billhook.cli import options
from billhook.cli.output import paths, print_json
from billhook.cli.progress import bars


def stack(
    model: options.Model,
    out: options.Out,
    calibration: options.Calibration = "builtin",
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    seed: options.Seed = 0,
    dtype: options.Dtype = options.DtypeName.AUTO,
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Write MODEL to DIR as one file of which any first part is a coarser model.

    The linears become blocks of about one bit a parameter, those first that gain most for a byte (BitStack).
    [bold]billhook unstack[/] makes a checkpoint of as much of it as is wanted.

    [dim]Example:[/] billhook stack demo --out out/stack
    """
    with bars() as progress:
        from billhook.recipes.stack import stack as walk

        sizes = walk(
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
        print_json({"sizes": asdict(sizes), "paths": paths(out)})
        return
    from billhook.report.numbers import quantity

    whole, always = (quantity(size, "bytes") for size in (sizes.whole, sizes.always))
    typer.echo(f"{out}: {whole}, of which {always} are needed at any size")
