"""What each score of width costs on SmolLM2-135M: time, and memory beside the model.

    python benchmarks/score_cost.py [MODEL] [TOKENS] [SCORE ...]      (default: demo 2048 all)

Every score of inner units in a process of its own, in float32, on all neurons and KV groups, or those of the two that
it is for; the text is read before the clock starts. Printed: the passes it makes over the text, seconds, these as a
multiple of one plain pass over the same text (so that machines compare), and the highest resident memory of the process
over what it was after such a pass (Linux). Half an hour on an idle core, most of it knockout's."""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from heal_memory import resident
from protocol import bed
from pydantic import ValidationError

from billhook.measure.batches import batches_of
from billhook.measure.patch import observing
from billhook.measure.sums import Trace
from billhook.plan.budget import Budget
from billhook.recipes.once import Once
from billhook.recipes.schema import Recipe
from billhook.recipes.widths import narrow
from billhook.runtime.clock import now
from billhook.scores.registry import SCORES
from billhook.search.width import pose_width

BUDGET = Budget.parse("params=0.9")  # groups alone cannot meet much less
MB = 1e6


@dataclass(frozen=True)
class Cost:
    passes: float
    seconds: float
    plain: float
    beside: float


def main(source: str = "demo", tokens: str = "2048", *names: str) -> None:
    print(f"{source}, float32, {tokens} tokens")
    print(
        f"{'score':<28} {'units':<7} {'needs':<9} {'passes':>6} {'seconds':>8} {'plain passes':>13} {'MB beside':>10}",
        flush=True,
    )
    for name in names or sorted(name for name, score in SCORES.items() if score.wide):
        recipe = recipe_of(name)
        if recipe is None:
            print(f"{name:<28} is no score of neurons or groups")
            continue
        with multiprocessing.get_context("spawn").Pool(1) as alone:
            cost = alone.apply(measured, (source, int(tokens), name))
        figures = (
            f"{cost.passes:>6.1f} {cost.seconds:>8.1f} {cost.seconds / cost.plain:>13.2f} {cost.beside / MB:>10.0f}"
        )
        print(f"{name:<28} {recipe.unit:<7} {SCORES[name].needs:<9} {figures}", flush=True)


def recipe_of(name: str) -> Recipe | None:
    """Of neurons and groups, or of those alone that the score is for."""
    words = {"score": {"word": name}, "choice": {"word": "widths", "allocation": "global"}}
    for unit in ("width", "neuron", "group"):
        with suppress(ValidationError):
            return Recipe.model_validate({"name": "bench", "title": name, "unit": unit, **words})
    return None


def measured(source: str, tokens: int, name: str) -> Cost:
    b = bed(source)
    b.live.float()
    windows = b.calibrated(tokens)
    recipe = recipe_of(name)
    assert recipe is not None
    problem = pose_width(b.anatomy.outline, BUDGET, recipe.unit, stack="decoder")
    begun = now()
    with observing(b.live):
        for inputs in batches_of(windows, b.live):
            b.live(**inputs)
    plain, before, highest, done = now() - begun, resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, resident())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = now()
    given = (recipe, b.model, problem, windows, windows, Trace(), Once())
    _, _, record, _ = narrow(*given, seed=0, place=Path(), progress=None)  # which writes only where widths evolve
    seconds = now() - begun
    done.set()
    watcher.join()
    blocks = sum(len(stack.blocks) for stack in b.anatomy.stacks)
    return Cost(record.work / (windows.tokens * blocks), seconds, plain, max(highest - before, 0))


if __name__ == "__main__":
    main(*sys.argv[1:])
