"""``billhook restore``."""

from __future__ import annotations

from typing import Annotated

import typer

from billhook.cli import options
from billhook.cli.progress import bars
from billhook.cli.results import show

_BASE = "The model that MODEL was trained from: same architecture, same shapes."
_RECIPE = (
    "[bold]restore-layers[/]: a run of blocks as they were in the base, chosen so that answers get more diverse; "
    "[bold]lines[/]: the first block as in the base, the last as in MODEL, those between in proportion; or a YAML file."
)


def restore(
    model: options.Model,
    base: Annotated[str, typer.Option(metavar="MODEL", show_default=False, help=_BASE)],
    out: options.Out,
    recipe: Annotated[
        str, typer.Option(metavar="NAME|FILE", autocompletion=options.recipe_names, help=_RECIPE)
    ] = "restore-layers",
    calibration: options.Calibration = "builtin",
    max_new_tokens: options.MaxNewTokens = 40,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    seed: options.Seed = 0,
    dtype: options.Dtype = options.DtypeName.AUTO,
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Take MODEL, trained on from a base, part of the way back to it, compare both, and write the result to DIR.

    Nothing is cut and nothing trained: the result is a checkpoint of the same architecture and size.

    [dim]Example:[/] billhook restore my-model-instruct --base my-model --out out/restored
    """
    with bars() as progress:
        from billhook.recipes.restore import restore as walk

        run = walk(
            model,
            base=base,
            out=out,
            recipe=recipe,
            calibration=calibration,
            seed=seed,
            dtype=dtype.chosen,
            device=device,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
    from billhook.report.headline import verdict

    show(run, out, as_json, told=verdict(run))
