"""What healing in closed form gives back: WikiText-2 and C4 perplexity of SmolLM2-135M, cut and healed.

    python benchmarks/heal_figures.py [MODEL] [TEXT] [TOKENS] [DTYPE] [RECIPE ...]
    (default: demo wiki_calib.txt.gz 24576 bfloat16)

Block influence with 6 of 30 blocks gone (with a bridge across their gap, too), and a fifth of the parameters gone as
single sublayers; with recipes (such as flap or cfsp) what each of them leaves at params=0.8 instead, healed by every
way without gradients where something got narrower. A quarter of an hour on two idle cores. DTYPE float32 is for
processors without bfloat16; say so with the figures.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from protocol import LENGTH, Bed, bed

from billhook.heal import healed
from billhook.plan.plan import Plan
from billhook.plan.target import Target
from billhook.recipes import catalogue
from billhook.recipes.heal import METHODS

SUBLAYERS = [f"decoder.{i}.mlp" for i in (3, 4, 5, 13, 16, 26)]
SUBLAYERS += [f"decoder.{i}.attention" for i in (5, 6, 7, 17, 25, 26)]


WAYS = ("closed-form", "bias", "data-free", "scales")
WORK = Path("out/benchmarks/heal-figures")


def main(
    source: str = "demo",
    text: str = "wiki_calib.txt.gz",
    tokens: str = "24576",
    dtype: str = "bfloat16",
    *recipes: str,
) -> int:
    b = bed(source)
    b.live.to(getattr(torch, dtype))
    plans = {name: by_recipe(b, name, text) for name in recipes} or of_depth(b, text)
    windows = b.calibrated(int(tokens), LENGTH, text)
    c4 = b.c4
    print(f"healed on {windows.ids.numel()} tokens of {text}, {dtype}")
    print(f"{'':<28} {'WikiText-2':>10} {'C4':>8} {'seconds':>8} {'refitted':>9}")
    print(f"{'dense':<28} {b.perplexity():>10.2f} {b.perplexity(test=c4):>8.2f}", flush=True)
    worse = False
    for name, plan in plans.items():
        cut = b.perplexity(plan), b.perplexity(plan, c4)
        print(f"{name:<28} {cut[0]:>10.2f} {cut[1]:>8.2f}", flush=True)
        gaps = ("bridge",) if any(unit.sublayer is None for unit in plan.drops) else ()
        for way in WAYS if plan.keeps else (*WAYS[:1], *gaps):
            begun = time.perf_counter()
            healing = METHODS[way](b.live, b.anatomy, plan, windows, None)
            seconds = time.perf_counter() - begun
            with healed(b.live, healing):
                now = b.perplexity(plan), b.perplexity(plan, c4)
            refitted = f"{healing.taken}/{len(healing.refits)}"
            print(f"{f'  {way}':<28} {now[0]:>10.2f} {now[1]:>8.2f} {seconds:>8.0f} {refitted:>9}", flush=True)
            worse |= now[0] > cut[0] or now[1] > cut[1]
    print(f"healing made nothing worse: {'no' if worse else 'yes'}")
    return 1 if worse else 0


def of_depth(b: Bed, text: str) -> dict[str, Plan]:
    influence = b.chosen("block-influence", "blocks=24", Target.UNIFORM, text=text)
    return {
        "6 blocks, block influence": influence.plan(Target.UNIFORM),
        "12 sublayers, greedy": Plan.of(SUBLAYERS),
    }


def by_recipe(b: Bed, name: str, text: str) -> Plan:
    target = Target.UNIFORM if catalogue.load(name).unit == "block" else Target.REMOTE
    return b.chosen(name, "params=0.8", target, text=text).plan(target)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
