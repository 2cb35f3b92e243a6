"""``billhook bench``: how fast is a model against another one?"""

from __future__ import annotations

import os
from collections.abc import Callable

from billhook import evaluate
from billhook.plan.record import Run
from billhook.recipes.evaluate import compared, pair
from billhook.recipes.opened import Stopwatch

Progress = Callable[[str, int, int], None]


def bench(
    source: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str],
    dtype: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Prefill, and decode at batch 1 and 8, of both models interleaved in this process; ratios, not clock readings."""
    clock = Stopwatch()
    with clock.step("load"):
        model, dense = pair(source, against, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    run = compared(source, model, dense)
    with clock.step("bench"):
        timings = evaluate.bench(dense.model, model.model, plan=run.plan, progress=progress)
    return run.model_copy(update={"timings": timings, "seconds": clock.seconds})
