"""What healing in closed form gives back: WikiText-2 and C4 perplexity of SmolLM2-135M, cut and healed.

    python benchmarks/heal_figures.py [MODEL] [TEXT] [TOKENS]      (default: demo wiki_calib.txt.gz 24576)

Block influence with 6 of 30 blocks gone, and a fifth of the parameters gone as single sublayers. Ten minutes on two
idle cores.
"""

from __future__ import annotations

import sys
import time

from protocol import DATA, LENGTH, bed

from billhook.data import windows as windows_of
from billhook.heal import closed_form, healed
from billhook.plan.budget import Budget
from billhook.plan.plan import Plan
from billhook.recipes import catalogue
from billhook.recipes.measures import watch
from billhook.recipes.settings import CALIBRATION_LENGTH, CALIBRATION_TOKENS, HEALING_TOKENS
from billhook.scores import named
from billhook.search import one_shot, pose

SUBLAYERS = [f"decoder.{i}.mlp" for i in (3, 4, 5, 13, 16, 26)]
SUBLAYERS += [f"decoder.{i}.attention" for i in (5, 6, 7, 17, 25, 26)]


def main(source: str = "demo", text: str = "wiki_calib.txt.gz", tokens: int = HEALING_TOKENS) -> int:
    b = bed(source)
    recipe = catalogue.load("block-influence")
    seen = watch(b.model, b.calibrated(CALIBRATION_TOKENS, CALIBRATION_LENGTH, text), None)
    scores = named("block-influence")(seen, b.anatomy, **recipe.score_parameters)
    problem = pose(b.anatomy.outline, Budget.parse("blocks=24"), recipe.unit)
    plans = {
        "6 blocks, block influence": Plan.of(one_shot(problem, scores, per="unit", work=0).drops),
        "12 sublayers, greedy": Plan.of(SUBLAYERS),
    }
    windows = b.calibrated(tokens, LENGTH, text)
    c4 = windows_of(DATA / "c4_docs.jsonl.gz", b.model.tokenizer, tokens=4 * LENGTH, length=LENGTH)
    print(f"healed on {windows.ids.numel()} tokens of {text}")
    print(f"{'':<28} {'WikiText-2':>10} {'C4':>8} {'seconds':>8} {'refitted':>9}")
    print(f"{'dense':<28} {b.perplexity():>10.2f} {b.perplexity(test=c4):>8.2f}", flush=True)
    worse = False
    for name, plan in plans.items():
        cut = b.perplexity(plan.drops), b.perplexity(plan.drops, c4)
        print(f"{name:<28} {cut[0]:>10.2f} {cut[1]:>8.2f}", flush=True)
        begun = time.perf_counter()
        healing = closed_form(b.live, b.anatomy, plan, windows)
        seconds = time.perf_counter() - begun
        with healed(b.live, healing):
            now = b.perplexity(plan.drops), b.perplexity(plan.drops, c4)
        refitted = f"{healing.taken}/{len(healing.refits)}"
        print(f"{'  healed':<28} {now[0]:>10.2f} {now[1]:>8.2f} {seconds:>8.0f} {refitted:>9}", flush=True)
        worse |= now[0] > cut[0] or now[1] > cut[1]
    print(f"healing made nothing worse: {'no' if worse else 'yes'}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3], *map(int, sys.argv[3:4])))
