"""WikiText-2 and C4 perplexity of SmolLM2-135M with half of the weights in its blocks set to zero.

    python benchmarks/sparsity_figures.py [MODEL] [DTYPE] [RECIPE ...]      (default: demo bfloat16 all)

Every recipe of single weights on the same calibration, at params=0.5; those that train read some fifty thousand tokens
more of the same text. DTYPE float32 is for processors without bfloat16, where it is many times faster; say so with the
figures. Minutes to an hour, by the machine."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import torch
from protocol import bed

from billhook.heal import healed
from billhook.measure.cost import cost
from billhook.plan.target import Target
from billhook.recipes import catalogue
from billhook.recipes.settings import HEALING_TOKENS, TRAINING_LENGTH, TRAINING_TOKENS
from billhook.runtime.clock import now

BUDGET = "params=0.5"


def main(source: str = "demo", dtype: str = "bfloat16", *recipes: str) -> None:
    b = bed(source)
    b.live.to(getattr(torch, dtype))
    c4 = b.c4
    lessons = b.calibrated(TRAINING_TOKENS * 8 // 7, TRAINING_LENGTH)
    outline = b.anatomy.outline
    dense = cost(outline)["params"]
    print(f"calibrated on {HEALING_TOKENS} tokens of wiki_calib, {dtype}, {BUDGET}")
    print(f"{'recipe':<18} {'realised':>8} {'WikiText-2':>10} {'C4':>8} {'seconds':>8}", flush=True)
    print(f"{'dense':<18} {1:>8.4f} {b.perplexity():>10.2f} {b.perplexity(test=c4):>8.2f}", flush=True)
    for name in recipes or [n for n in catalogue.names() if catalogue.load(n).unit == "weight"]:
        begun = now()
        choice = b.chosen(name, BUDGET, Target.UNIFORM, lessons=lessons)
        seconds = now() - begun
        plan = choice.plan(Target.UNIFORM)
        zeros = {edit.unit: sum(edit.zeros.values()) for edit in choice.sparsities}
        share = cost(outline, zeros=zeros)["params"] / dense
        around: Any = healed(b.live, choice.healing) if choice.healing else nullcontext()
        with around:
            figures = f"{b.perplexity(plan):>10.2f} {b.perplexity(plan, c4):>8.2f}"
        print(f"{name:<18} {share:>8.4f} {figures} {seconds:>8.1f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
