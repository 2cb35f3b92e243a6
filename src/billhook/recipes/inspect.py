"""``billhook inspect``: what does a model consist of, and how much does each part do?"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from billhook.data import Windows
from billhook.measure.audit import audit
from billhook.measure.cost import quantities
from billhook.measure.features import complexity
from billhook.measure.width import units_of
from billhook.models import building, check_out
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan, Provenance
from billhook.plan.record import COMPLEXITY, Run
from billhook.recipes.measures import measures, watch
from billhook.recipes.opened import Opened, Stopwatch, environment, opened
from billhook.recipes.proof import write_down
from billhook.recipes.texts import calibration_text

Progress = Callable[[str, int, int], None]


def inspect(
    source: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    calibration: str = "builtin",
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Find the parts of a model and measure, in one pass over the calibration, how much each changes the stream.

    A model that text alone does not reach (one without a tokenizer, one that listens, a pair of towers) is described
    without being measured. With ``out`` every stack that the text reaches is audited as well (see ``measure.audit``),
    and the record and the page are written there.
    """
    if out is not None:
        check_out(out, overwrite, source)
    clock = Stopwatch()
    with clock.step("load"):
        model = opened(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    run = Run(
        model=os.fspath(source),
        outline=model.anatomy.outline,
        plan=Plan(provenance=Provenance(seed=seed)),
        costs=quantities(model.anatomy.outline, ()),
        environment=environment(model),
    )
    if _reads_text(model):
        with clock.step("measure"):
            windows = calibration_text(model, calibration, seed, progress)
            seen = watch(model, windows, progress)
            alike = {} if out is None else {COMPLEXITY: complexities(model, progress)}
        run = run.model_copy(update={"measures": measures(model, calibration, windows, seen, alike)})
        if out is not None:
            with clock.step("audit"):
                fit, held = divided(windows)
                audits = {
                    stack: audit(model.model, model.anatomy, fit, held, seen, stack, progress) for stack in seen.angles
                }
            run = run.model_copy(update={"audits": audits})
    run = run.model_copy(update={"seconds": clock.seconds})
    if out is not None:
        with building(out, overwrite) as folder:
            write_down(run, Path(folder))
    return run


def complexities(model: Opened, progress: Progress | None) -> dict[str, float]:
    """The feature complexity of every MLP that has neurons of its own."""
    units = units_of(model.anatomy, "neuron", sorted(model.anatomy.inner))
    weights = dict(model.model.named_parameters(remove_duplicate=False))
    found = {}
    for number, (address, inner) in enumerate(units.items(), start=1):
        found[str(address)] = complexity(inner, weights)
        if progress is not None:
            progress("features", number, len(units))
    return found


def _reads_text(model: Opened) -> bool:
    stacks = {stack.name for stack in model.anatomy.stacks}
    towers = "vision" in stacks and "decoder" not in stacks  # which look at an image whenever they read
    mute = model.loaded.tokenizer is None or model.anatomy.embedding is None or towers
    return not mute and bool(model.model.main_input_name == "input_ids")


def divided(windows: Windows) -> tuple[Windows, Windows]:
    """The text that maps are fitted on, and the last third of the windows, at least one, which they never see. A single
    window is cut in two. InputError for less than two tokens."""
    ids = windows.ids
    if len(ids) == 1:
        if ids.shape[1] < 2:
            raise InputError(f"an audit needs two tokens at least; {windows.name} has {ids.shape[1]}")
        half = ids.shape[1] // 2
        ids = ids[:, : 2 * half].reshape(2, half)
    kept = len(ids) - max(1, len(ids) // 3)
    return Windows.of(ids[:kept], f"{windows.name}, fitted"), Windows.of(ids[kept:], f"{windows.name}, held back")
