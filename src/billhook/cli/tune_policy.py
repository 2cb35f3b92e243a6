"""``billhook tune-policy``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from billhook.cli import options
from billhook.cli.output import print_json, print_views
from billhook.cli.progress import bars

_TARGET = "The quality to keep, against the plain model: kl<=0.05, top1>=0.95 or perplexity<=1.1 (a ratio)."


def tune_policy(
    model: options.Model,
    policy: options.PolicyName,
    target: Annotated[str, typer.Option(metavar="BOUND", show_default=False, help=_TARGET)],
    out: Annotated[Path, typer.Option(metavar="FILE", show_default=False, help="Where the policy goes: a .json file.")],
    calibration: options.Calibration = "builtin",
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    seed: options.Seed = 0,
    dtype: options.Dtype = options.DtypeName.AUTO,
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Find the setting of a policy that saves most while MODEL keeps a quality target on your text, and write it down.

    The file is for --policy of generate and bench. Shown is how it does on text that it was not tuned on.

    [dim]Example:[/] billhook tune-policy demo --policy ffn-skip --target "kl<=0.05" --out ffn.json
    """
    with bars() as progress:
        from billhook.recipes.policy import tune_policy as walk

        report, tried = walk(
            model,
            policy,
            target,
            out,
            text=calibration,
            overwrite=overwrite,
            seed=seed,
            dtype=dtype.chosen,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json({**report.model_dump(mode="json"), "tried": [vars(t) for t in tried], "paths": {"policy": str(out)}})
        return
    from billhook.cli import policy_views

    found = ", ".join(f"{key}={value}" for key, value in report.parameters.items() if not isinstance(value, list))
    print_views(Text(f"{out}: {report.policy}:{found}"), *policy_views.views(report))
