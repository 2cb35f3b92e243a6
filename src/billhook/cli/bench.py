"""``billhook bench``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from billhook.cli import options
from billhook.cli.output import print_json, print_views, run_json
from billhook.cli.progress import bars

_AGAINST = "The dense model to compare with, timed in turns with DIR."


def bench(
    folder: options.Folder,
    against: Annotated[str | None, typer.Option(metavar="MODEL", show_default=False, help=_AGAINST)] = None,
    policy: options.Policy = None,
    calibration: options.Calibration = "builtin",
    as_json: options.Json = False,
    seed: options.Seed = 0,
    dtype: options.Dtype = options.DtypeName.AUTO,
    device: options.Device = "cpu",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Time DIR against MODEL: reading a prompt, and generating at batch 1 and 8. Or with --policy time DIR under it
    against itself without, and show the work that it saves and what it costs in quality.

    Both run in turns in one process; shown are the median ratio and its quartiles. The prompts are always the same:
    --seed changes nothing here, but which text a policy is judged on.

    [dim]Example:[/] billhook bench out/demo --against demo
    """
    if (against is None) == (policy is None):
        raise typer.BadParameter("give either --against MODEL or --policy NAME")
    if policy is not None:
        with bars() as progress:
            from billhook.recipes.policy import bench_policy

            report = bench_policy(
                folder,
                policy,
                text=calibration,
                seed=seed,
                dtype=dtype.chosen,
                device=device,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        if as_json:
            print_json(report.model_dump(mode="json"))
            return
        from billhook.cli import policy_views

        print_views(*policy_views.views(report))
        return
    assert against is not None
    with bars() as progress:
        from billhook.recipes.bench import bench as walk

        run = walk(
            folder,
            against=against,
            dtype=dtype.chosen,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json(run_json(run))
        return
    from billhook.cli import tables

    print_views(tables.compared(run), *(Text(timing.engine, style="dim") for timing in run.timings[:1]))
