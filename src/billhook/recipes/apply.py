"""``billhook apply``: a plan that exists already, carried out on a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from billhook.export.huggingface import write_checkpoint
from billhook.measure.cost import quantities
from billhook.models import building, check_out, locate
from billhook.plan.check import normalise
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.record import Run
from billhook.plan.target import Target
from billhook.recipes.opened import Stopwatch, left_behind
from billhook.recipes.proof import write_down
from billhook.surgery.checkpoint import checkpoint_fingerprint

Progress = Callable[[str, int, int], None]


def apply(
    source: str | os.PathLike[str],
    plan: Plan | str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    target: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Rewrite a checkpoint on disk, one tensor at a time, without loading the model.

    ``plan`` is a plan, its file, or a ``billhook.json`` (or the folder it lies in). Nothing is measured: ``billhook
    eval`` does that. Raises InputError for a plan that was made for another model, or that drops nothing.
    """
    check_out(out, overwrite, source)
    if not isinstance(plan, Plan):
        plan = Plan.read(plan)
    if target is not None:
        plan = plan.model_copy(update={"target": Target(target)})
    if not plan.edits:
        raise InputError("the plan drops nothing; there is nothing to apply")
    clock = Stopwatch()
    folder = locate(source, trust_remote_code)
    with clock.step("apply"), building(out, overwrite) as place:
        wanted = plan.provenance.model
        if wanted and checkpoint_fingerprint(folder) != wanted:
            raise InputError(f"the plan was made for another model than {source}: their fingerprints differ")
        done = write_checkpoint(folder, plan, Path(place))
        outline = done.anatomy.outline
        costs = quantities(outline, normalise(plan.drops, outline))
        run = Run(
            model=os.fspath(source),
            outline=outline,
            plan=plan,
            asked=plan.budget,
            costs=costs,
            realised={kind: cost.compressed / cost.dense for kind, cost in costs.items() if cost.dense},
            environment=left_behind(done.left_out),
        )
        write_down(run, Path(place))
    return run.model_copy(update={"seconds": clock.seconds})
