"""``billhook compress``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from billhook.cli import options
from billhook.cli.progress import bars
from billhook.cli.results import show

_BUDGET = (
    "What the result may cost: a fraction of dense (params=0.8) or a number with its unit (size=100MB). "
    "Kinds: params, size, memory, flops, kv_bytes, blocks; several with commas between. "
    "Or latency=0.8: the time of decoding, measured. "
    "Or until=cliff: cut until a step from the fourth on costs, for what it frees, over 3 times as much as any before "
    "it; where costs climb steadily, over 3 times the usual (median) climb."
)


def compress(
    model: options.Model,
    budget: Annotated[str, typer.Option(metavar="KIND=NUMBER", show_default=False, help=_BUDGET)],
    out: options.Out,
    recipe: options.Recipe = None,
    heal: options.Heal = None,
    select: options.Select = "none",
    target: options.Target = None,
    calibration: options.Calibration = "builtin",
    prior: Annotated[
        Path | None,
        typer.Option(metavar="DIR", show_default=False, help="Learned masks begin with those of this earlier result."),
    ] = None,
    max_new_tokens: options.MaxNewTokens = 40,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    seed: options.Seed = 0,
    dtype: options.Dtype = options.DtypeName.AUTO,
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Cut MODEL down to a budget, heal what is left, compare the result with MODEL, and write both to DIR.

    The recipe says what goes: whole blocks, attentions and MLPs, or what is inside them (heads, neurons, experts,
    hidden channels, single weights, ranks of linears).

    DIR gets the smaller checkpoint, billhook.json (the plan and all that was measured), a model card and report.html.
    An interrupted run continues where it was when the same command is given again.

    [dim]Example:[/] billhook compress demo --budget params=0.8 --out out/demo
    """
    with bars() as progress:
        from billhook.recipes.compress import compress as walk

        run = walk(
            model,
            budget=budget,
            out=out,
            recipe=recipe,
            heal=heal,
            select=select,
            target=target,
            calibration=calibration,
            seed=seed,
            dtype=dtype.chosen,
            device=device,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            max_new_tokens=max_new_tokens,
            prior=prior,
            progress=progress,
        )
    show(run, out, as_json)
