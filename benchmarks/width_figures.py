"""WikiText-2 and C4 perplexity of SmolLM2-135M at 20% of the block parameters, cut in width, on the same calibration.

    python benchmarks/width_figures.py [MODEL] [DTYPE] [RECIPE ...] [text=FILE] [skip=N] [survey=TOKENS]
    (default: demo bfloat16, all recipes, text=wiki_calib.txt.gz skip=0 survey=20480)

Another text of the test data, or other windows of the same (after ``skip`` of them), say how far a figure depends on
what it was calibrated on; so does the length of the text that scores of a single pass read.

Every recipe of width, those of hidden channels included, then two choices that look at nothing: the same widths as the
first recipe's, with units at random (seed 0) and evenly spaced. Nothing is healed. DTYPE float32 is for processors
without bfloat16, where it is many times faster; say so with the figures. Two hundred passes of a window: minutes to an
hour, by the machine."""

from __future__ import annotations

import random
import sys
from time import perf_counter as now

import torch
from protocol import Bed, bed

from billhook.data import Windows
from billhook.measure.cost import CostModel
from billhook.plan.plan import Keep, Plan
from billhook.plan.target import Target
from billhook.recipes import catalogue
from billhook.recipes.settings import CALIBRATION_TOKENS, HEALING_TOKENS
from billhook.surgery import simulate

BUDGET = "params=0.8"


def main(source: str = "demo", dtype: str = "bfloat16", *more: str) -> None:
    given = {"text": "wiki_calib.txt.gz", "skip": "0", "survey": str(HEALING_TOKENS)}
    given |= dict(word.split("=", 1) for word in more if "=" in word)
    text, skip, survey = given["text"], int(given["skip"]), int(given["survey"])
    recipes = [word for word in more if "=" not in word]
    b = bed(source)
    b.live.to(getattr(torch, dtype))
    c4 = b.c4
    print(f"searched on {CALIBRATION_TOKENS} and scored on {survey} tokens of {text} from window {skip} on, {dtype}")
    print(f"{BUDGET:<24} {'realised':>8} {'WikiText-2':>10} {'C4':>8} {'seconds':>8}  units left", flush=True)
    show(b, "dense", Plan.of([]), c4, 0.0)
    first: tuple[Keep, ...] = ()
    for name in recipes or [
        n for n in catalogue.names() if catalogue.load(n).wide or catalogue.load(n).unit == "channel"
    ]:
        begun = now()
        choice = b.chosen(name, BUDGET, text=text, skip=skip, survey=survey)
        show(b, name, choice.plan(Target.REMOTE), c4, now() - begun)
        first = first or choice.keeps
    for name, choose in (("random", at_random), ("evenly-spaced", evenly_spaced)) if first else ():
        blind = Plan.of([], Target.REMOTE, [choose(b, keep) for keep in first])
        show(b, f"{name}, widths as above", blind, c4, 0.0)


def at_random(b: Bed, keep: Keep) -> Keep:
    count = count_of(b, keep)
    chosen = random.Random(f"{keep.unit} 0").sample(range(count), len(keep.indices))
    return keep.model_copy(update={"indices": tuple(sorted(chosen))})


def evenly_spaced(b: Bed, keep: Keep) -> Keep:
    count, left = count_of(b, keep), len(keep.indices)
    return keep.model_copy(update={"indices": tuple((2 * i + 1) * count // (2 * left) for i in range(left))})


def count_of(b: Bed, keep: Keep) -> int:
    return dict(b.anatomy.outline.sublayers())[keep.unit].inner[keep.inner].count


def show(b: Bed, name: str, plan: Plan, c4: Windows, seconds: float) -> None:
    costs = CostModel(b.anatomy.outline)
    share = costs.of((), plan.keeps, channels=plan.channels)["params"] / costs.dense["params"]
    with simulate(b.live, b.anatomy, plan):
        figures = f"{b.perplexity():>10.2f} {b.perplexity(test=c4):>8.2f}"
    left = " ".join(f"{keep.unit.block}.{keep.inner[0]}{len(keep.indices)}" for keep in plan.keeps)
    left += " ".join(f"{len(edit.indices)} hidden channels" for edit in plan.channels)
    print(f"{name:<24} {share:>8.3f} {figures} {seconds:>8.1f}  {left}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
