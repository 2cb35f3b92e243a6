"""The last steps of a walk: dense and compressed side by side, and everything written down."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from billhook.data import Windows, evaluation
from billhook.data.calibrate import Domain
from billhook.evaluate import bench, evidence_of_each, generations, probes
from billhook.plan.plan import Plan
from billhook.plan.record import Run
from billhook.recipes.opened import Opened, Stopwatch
from billhook.recipes.settings import EVALUATION_LENGTH, EVALUATION_TOKENS
from billhook.recipes.together import of_the_first
from billhook.report.card import card
from billhook.report.page import write_report

Progress = Callable[[str, int, int], None]
RECORD = "billhook.json"


def judged_on(
    model: Opened,
    calibration: str,
    calibrated_on: Sequence[Windows],
    seed: int,
    progress: Progress | None,
    *,
    read_before: Iterable[str] = (),
    tokens: int | None = None,
    length: int | None = None,
) -> Sequence[tuple[Domain, Windows]]:
    """Text that the calibration cannot have seen: of its own domain, and of another."""
    return of_the_first(
        lambda: evaluation(
            calibration,
            model.tokenizer,
            tokens=tokens or EVALUATION_TOKENS,
            length=model.length(length or EVALUATION_LENGTH),
            calibrated_on=calibrated_on,
            read_before=read_before,
            model=model.model,
            seed=seed,
            progress=progress,
        )
    )


def proven(
    run: Run,
    model: Opened,
    cut: Any,
    compressed: Any,
    plan: Plan,
    texts: Sequence[tuple[Domain, Windows]],
    max_new_tokens: int,
    watch: Stopwatch,
    progress: Progress | None,
    begun: Any = None,
) -> Run:
    """The record with evidence, exact answers, generations and timings of both models added; where ``cut`` was healed,
    its evidence too, and that of the model that a training ``begun`` with."""
    with watch.step("evidence"):
        candidates = [compressed] if run.healing is None else [compressed, cut]
        candidates += [begun] if begun is not None else []
        found, *unhealed = evidence_of_each(model.model, candidates, texts, progress=progress)
        if run.healing is not None:
            healing = run.healing.model_copy(update={"unhealed": unhealed[0]})
            if healing.training is not None:
                trained = healing.training.model_copy(update={"untrained": unhealed[1]})
                healing = healing.model_copy(update={"training": trained})
            run = run.model_copy(update={"healing": healing})
    with watch.step("probes"):
        answered = probes(model.model, compressed, model.tokenizer, progress=progress)
    with watch.step("generations"):
        said = generations(model.model, compressed, model.tokenizer, max_new_tokens=max_new_tokens)
    with watch.step("bench"):
        timings = bench(model.model, compressed, plan=plan, progress=progress)
    return run.model_copy(update={"evidence": found, "probes": answered, "generations": said, "timings": timings})


def write_down(run: Run, folder: Path) -> None:
    """The record with the arrays of its plan, the page and, for a checkpoint, its card, into an existing folder."""
    run.plan.arrays.write(folder / RECORD)
    (folder / RECORD).write_text(run.model_dump_json(indent=2) + "\n", encoding="utf-8")
    write_report(run, folder)
    if (folder / "config.json").is_file():
        (folder / "README.md").write_text(card(run), encoding="utf-8")
