"""WikiText-2 and C4 perplexity of SmolLM2-135M at 20% of the block parameters, by low rank, and of width healed.

    python benchmarks/lowrank_figures.py [MODEL] [DTYPE] [RECIPE ...]         (default: demo bfloat16, all of low rank)

Every recipe of low rank, as cut, and healed in closed form, both on 20,480 tokens of wiki_calib. Recipes
of width that are named besides are healed by their bias, without data and in closed form. DTYPE float32 is for
processors without bfloat16; say so with the figures. Minutes."""

from __future__ import annotations

import sys

import torch
from protocol import Bed, bed

from billhook.data import Windows
from billhook.heal import healed
from billhook.measure.cost import CostModel
from billhook.plan.plan import Plan
from billhook.plan.target import Target
from billhook.recipes import catalogue
from billhook.recipes.heal import METHODS
from billhook.recipes.settings import HEALING_TOKENS
from billhook.runtime.clock import now

BUDGET = "params=0.8"


def main(source: str = "demo", dtype: str = "bfloat16", *recipes: str) -> None:
    b = bed(source)
    b.live.to(getattr(torch, dtype))
    c4 = b.c4
    longer = b.calibrated(HEALING_TOKENS)
    print(f"scored and healed on {HEALING_TOKENS} tokens of wiki_calib, {dtype}, {BUDGET}")
    print(f"{'recipe':<22} {'heal':<12} {'realised':>8} {'WikiText-2':>10} {'C4':>8} {'seconds':>8}", flush=True)
    show(b, "dense", "", Plan(), c4, 0.0)
    for name in recipes or [n for n in catalogue.names() if catalogue.load(n).unit == "linear"]:
        recipe = catalogue.load(name)
        begun = now()
        plan = b.chosen(name, BUDGET).plan(Target.REMOTE)
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
