"""``billhook heal``."""

from __future__ import annotations

from typing import Annotated

import typer

from billhook.cli import options
from billhook.cli.progress import bars
from billhook.cli.results import show
from billhook.plan.heals import Method
from billhook.recipes.settings import TRAINING_TOKENS

_DIR = "A cut model that Billhook wrote."
_METHOD = (
    "[bold]closed-form[/]: least squares; [bold]bridge[/]: besides, maps of low rank across gaps; [bold]bias[/], "
    "[bold]data-free[/], [bold]scales[/]: for what got narrower; "
    "[bold]eora[/]: paths of low rank beside linears with zeros; "
    "[bold]distill[/]: adapters learn from the dense model; [bold]tail[/]: of its stream only the end; [bold]lora[/]: "
    "they learn the text; [bold]tune[/]: norms, biases and scales of rows only; [bold]lisa[/], [bold]ist[/], "
    "[bold]fpf[/]: a few blocks at a time; [bold]skips[/]: adapters, with blocks missing at random, so that skipping "
    "hurts less; [bold]kv-routing[/]: adapters, with keys and values of earlier blocks at random, so that kv-share "
    "hurts less."
)
_AGAINST = "The dense model, where it is not where DIR's record says."
_CALIBRATION = f"{options.CALIBRATION_HELP} Else the one DIR was made with."


def heal(
    folder: Annotated[str, typer.Argument(metavar="DIR", show_default=False, help=_DIR)],
    out: options.Out,
    method: Annotated[Method, typer.Option(metavar="NAME", help=_METHOD)] = "distill",
    against: Annotated[str | None, typer.Option(metavar="MODEL", show_default=False, help=_AGAINST)] = None,
    calibration: Annotated[str | None, typer.Option(metavar="SOURCE", show_default=False, help=_CALIBRATION)] = None,
    select: options.Select = "none",
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens to train on.")] = TRAINING_TOKENS,
    max_new_tokens: options.MaxNewTokens = 40,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    seed: options.Seed = 0,
    dtype: options.Dtype = options.DtypeName.AUTO,
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Heal DIR, a cut model that Billhook wrote, and write the better one to a new folder.

    What was never healed is refitted in closed form, then trained; of all that comes by, DIR as it is included, the
    best on held-back text is kept. An interrupted run continues when the same command is given again. Under
    accelerate launch refit and training are shared by several devices.

    [dim]Example:[/] billhook heal out/demo --method distill --tokens 200000 --out out/healed
    """
    with bars() as progress:
        from billhook.recipes.heal import heal as walk

        run = walk(
            folder,
            out=out,
            method=method,
            against=against,
            calibration=calibration,
            select=select,
            tokens=tokens,
            seed=seed,
            dtype=dtype.chosen,
            device=device,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
    show(run, out, as_json)
