"""WikiText-2 and C4 perplexity of SmolLM2-135M at 20% of the block parameters, by low rank, and of width healed.

    python benchmarks/lowrank_figures.py [MODEL] [DTYPE] [RECIPE ...]         (default: demo bfloat16, all of low rank)

Every recipe of low rank, calibrated on 8,192 tokens of wiki_calib: as cut, and healed in closed form on 16,384. Recipes
of width that are named besides are healed by their bias, without data and in closed form. DTYPE float32 is for
processors without bfloat16; say so with the figures. Minutes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from protocol import DATA, LENGTH, Bed, bed

from billhook.data import Windows
from billhook.data import windows as windows_of
from billhook.heal import healed
from billhook.measure.cost import CostModel
from billhook.measure.latency import now
from billhook.plan.budget import Budget
from billhook.plan.plan import Plan
from billhook.plan.target import Target
from billhook.recipes import catalogue
from billhook.recipes.find import find, pose_for
from billhook.recipes.heal import METHODS
from billhook.recipes.measures import watch

BUDGET = "params=0.8"
TOKENS, HEALING = 8192, 16384
WORK = Path("out/benchmarks/lowrank-figures")


def main(source: str = "demo", dtype: str = "bfloat16", *recipes: str) -> None:
    b = bed(source)
    b.live.to(getattr(torch, dtype))
    c4 = windows_of(DATA / "c4_docs.jsonl.gz", b.model.tokenizer, tokens=4 * LENGTH, length=LENGTH)
    windows, longer = b.calibrated(TOKENS), b.calibrated(HEALING)
    print(f"calibrated on {TOKENS} tokens of wiki_calib, healed on {HEALING}, {dtype}, {BUDGET}")
    print(f"{'recipe':<22} {'heal':<12} {'realised':>8} {'WikiText-2':>10} {'C4':>8} {'seconds':>8}", flush=True)
    show(b, "dense", "", Plan(), c4, 0.0)
    for name in recipes or [n for n in catalogue.names() if catalogue.load(n).unit == "linear"]:
        recipe = catalogue.load(name)
        problem = pose_for(recipe, b.anatomy.outline, Budget.parse(BUDGET), Target.REMOTE)
        begun = now()
        seen: Any = watch(b.model, windows, None) if recipe.wide else None
        plan = find(recipe, b.model, problem, windows, seen, seed=0, place=WORK, progress=None).plan(Target.REMOTE)
        show(b, name, "none", plan, c4, now() - begun)
        for method in ("bias", "data-free", "closed-form") if recipe.wide else ("closed-form",):
            begun = now()
            healing = METHODS[method](b.live, b.anatomy, plan, longer, None)
            took = now() - begun
            with healed(b.live, healing):
                show(b, name, method, plan, c4, took)


def show(b: Bed, name: str, method: str, plan: Plan, c4: Windows, seconds: float) -> None:
    costs = CostModel(b.anatomy.outline)
    share = costs.of(plan.drops, plan.keeps, None, plan.factors)["params"] / costs.dense["params"]
    figures = f"{b.perplexity(plan):>10.2f} {b.perplexity(plan, c4):>8.2f}"
    print(f"{name:<22} {method:<12} {share:>8.3f} {figures} {seconds:>8.1f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
