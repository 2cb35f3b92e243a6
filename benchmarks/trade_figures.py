"""What the same 20% of the block parameters buys as depth, as width and mixed: quality beside speed, in one run.

Each recipe cuts SmolLM2-135M on the same calibration text, nothing is healed; then all the cut models and the dense one
take turns, so that a speed-up is a ratio of runs that stood beside each other. Prints perplexities, and the median
speed-up with its quartiles.

    python benchmarks/trade_figures.py [DTYPE] [RECIPE ...]     (default: bfloat16 and those of RECIPES)

DTYPE float32 is for processors without bfloat16. About ten minutes on two idle CPU cores."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from protocol import bed

from billhook.evaluate.bench import engine
from billhook.evaluate.intervals import quartiles
from billhook.evaluate.workload import DECODE_1, PREFILL, prompt_ids, ready
from billhook.measure.cost import CostModel
from billhook.measure.latency import interleaved
from billhook.measure.patch import observing
from billhook.plan.plan import Plan
from billhook.plan.target import Target
from billhook.surgery import apply

BUDGET = "params=0.8"
RECIPES = ("block-influence", "sublayer-greedy", "cfsp", "comp", "random")
WORK = Path("out/benchmarks/trade-figures")
ROUNDS = 9


def main(dtype: str = "bfloat16", *recipes: str) -> None:
    b = bed()
    b.live.to(getattr(torch, dtype))
    c4 = b.c4
    plans = {"dense": Plan(), **{name: b.chosen(name, BUDGET).plan(Target.REMOTE) for name in recipes or RECIPES}}
    print(f"{'recipe':<18} {'params':>7} {'WikiText-2':>10} {'C4':>8}", flush=True)
    costs = CostModel(b.anatomy.outline)
    for name, plan in plans.items():
        share = costs.of(plan.drops, plan.keeps)["params"] / costs.dense["params"]
        print(f"{name:<18} {share:>7.3f} {b.perplexity(plan):>10.2f} {b.perplexity(plan, c4):>8.2f}", flush=True)
    models = {name: apply(b.live, b.anatomy, plan) if name != "dense" else b.live for name, plan in plans.items()}
    for workload in (PREFILL, DECODE_1):
        timed(models, workload)
    print(engine(b.live))


def timed(models: dict[str, Any], workload: Any) -> None:
    print(f"{workload.name}: speed-up over the dense model, median and quartiles of {ROUNDS} rounds")
    ids = prompt_ids(workload, models["dense"])
    for model in models.values():
        model.eval()
    with observing(models["dense"]):
        times = interleaved({name: ready(model, workload, ids) for name, model in models.items()}, ROUNDS)
    for name, seconds in times.items():
        speed = quartiles([d / c for d, c in zip(times["dense"], seconds, strict=True)])
        print(f"  {name:<18} {speed.value:>6.3f} {speed.low:>6.3f} {speed.high:>6.3f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
