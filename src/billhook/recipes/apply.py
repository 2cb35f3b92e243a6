"""``billhook apply``: a plan that exists already, carried out on a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from billhook.export.huggingface import write_checkpoint
from billhook.models import building, check_out, locate
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.record import Run
from billhook.plan.target import Target
from billhook.recipes.costs import costs_of, of_dense
from billhook.recipes.opened import Stopwatch, left_behind
from billhook.recipes.proof import RECORD, write_down
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
    eval`` does that. Nothing is healed either: where ``plan`` is of a result that was, the record says so under
    ``not healed`` in its environment. Raises InputError for a plan that was made for another model, or that drops
    nothing.
    """
    check_out(out, overwrite, source)
    lost = {}
    if not isinstance(plan, Plan):
        file, plan = Path(plan), Plan.read(plan)
        lost = _lost(file)
    if target is not None:
        plan = plan.model_copy(update={"target": Target(target)})
    if plan.empty:
        raise InputError("the plan drops nothing; there is nothing to apply")
    clock = Stopwatch()
    folder = locate(source, trust_remote_code)
    with clock.step("apply"), building(out, overwrite) as place:
        wanted = plan.provenance.model
        if wanted and checkpoint_fingerprint(folder) != wanted:
            raise InputError(f"the plan was made for another model than {source}: their fingerprints differ")
        done = write_checkpoint(folder, plan, Path(place))
        outline = done.anatomy.outline
        costs = costs_of(plan, outline, done.zeros)
        run = Run(
            model=os.fspath(source),
            outline=outline,
            plan=plan,
            asked=plan.budget,
            costs=costs,
            realised=of_dense(costs),
            environment=left_behind(done.left_out) | lost,
        )
        write_down(run, Path(place))
    return run.model_copy(update={"seconds": clock.seconds})


def _lost(source: Path) -> dict[str, str]:
    """That the result which a plan was taken from was healed, if its record says so."""
    path = source / RECORD if source.is_dir() else source
    record = json.loads(path.read_text(encoding="utf-8"))
    healing = record.get("healing") if isinstance(record, dict) else None
    if not healing:
        return {}
    return {"not healed": f"{path} is of a healed result; a plan holds no weights, so this one is cut and not healed"}
