"""WikiText-2 perplexity of a small trained mixture of experts (mixtral-tiny of the shared models) with half of its
experts, by each recipe of experts.

    python benchmarks/expert_figures.py [MODEL] [TOKENS] [SEEDS] [BUDGET]  (default: mixtral-tiny 16384 5 params=0.55)

Chosen on 3,072 tokens of wiki_calib, merged and healed on 24,576, judged on the first TOKENS of WikiText-2 test in
windows of 256, float32. The model has seen wiki_calib in training. Random choices are drawn SEEDS times. Minutes."""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path

import torch
from protocol import DATA

from billhook.data import windows
from billhook.heal import UNTOUCHED, Healing, closed_form, healed, merge
from billhook.measure.cost import CostModel
from billhook.plan.budget import Budget
from billhook.plan.plan import Plan
from billhook.recipes import catalogue
from billhook.recipes.find import find, pose_for
from billhook.recipes.measures import watch
from billhook.recipes.opened import opened
from billhook.surgery import simulate

MODELS = DATA.parent / "models"
LENGTH = 256
WORK = Path("out/benchmarks/expert-figures")


def main(
    source: str = str(MODELS / "mixtral-tiny"), tokens: str = "16384", seeds: str = "5", budget: str = "params=0.55"
) -> None:
    model = opened(source, dtype="float32", device="cpu", trust_remote_code=False)
    live, anatomy = model.model, model.anatomy
    read = model.tokenizer
    test = windows(DATA / "wikitext2_raw_test.txt.gz", read, tokens=int(tokens), length=LENGTH)
    seen = windows(DATA / "wiki_calib.txt.gz", read, tokens=3072, length=512)
    longer = windows(DATA / "wiki_calib.txt.gz", read, tokens=24576, length=512)
    trace = watch(model, seen, None)
    costs = CostModel(anatomy.outline)

    @torch.inference_mode()
    def perplexity(plan: Plan, healing: Healing = UNTOUCHED) -> float:
        total = 0.0
        with healed(live, healing), simulate(live, anatomy, plan):
            for ids in torch.split(test.ids, 8):
                logits = live(ids).logits[:, :-1].float()
                total += torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
                ).item()
        return math.exp(total / (len(test.ids) * (LENGTH - 1)))

    def chosen(name: str, seed: int = 0) -> Plan:
        recipe = catalogue.load(name)
        problem = pose_for(recipe, anatomy.outline, Budget.parse(budget), recipe.aim)
        return find(recipe, model, problem, seen, trace, seed=seed, place=WORK, progress=None).plan(recipe.aim)

    def show(name: str, plan: Plan, *figures: float) -> None:
        share = costs.of((), plan.keeps, factors=plan.factors)["params"] / costs.dense["params"]
        left = "+".join(str(len(keep.indices)) for keep in plan.keeps) or "all"
        mean = statistics.fmean(figures)
        spread = f"  ({min(figures):.1f} to {max(figures):.1f}, {len(figures)} seeds)" if len(figures) > 1 else ""
        print(f"{name:<52} {share:>6.3f} {left:>9} {mean:>8.1f}{spread}", flush=True)

    print(f"{'experts chosen by':<52} {'params':>6} {'left':>9} {'WikiText-2':>8}", flush=True)
    show("dense", Plan(), perplexity(Plan()))
    drawn = [chosen("random-experts", seed) for seed in range(int(seeds))]
    show("random-experts", drawn[0], *(perplexity(plan) for plan in drawn))
    for name in ("evenly-spaced-experts", "expert-frequency", "m-smoe-adaptive"):
        plan = chosen(name)
        merged = {"expert-frequency": "m-smoe"}.get(name, name)
        dropped = "the same experts as m-smoe-adaptive, dropped" if name == "m-smoe-adaptive" else name
        show(dropped, plan, perplexity(plan))
        if name != "evenly-spaced-experts":
            show(f"{dropped}, --heal closed-form", plan, perplexity(plan, closed_form(live, anatomy, plan, longer)))
            show(merged, plan, perplexity(plan, merge(live, anatomy, plan, longer)))
    merged_at_random = [perplexity(plan, merge(live, anatomy, plan, longer)) for plan in drawn]
    show("random-experts, the others merged into them", drawn[0], *merged_at_random)
    plan = chosen("mc-smoe")
    show("the same experts as mc-smoe, dropped and taken apart", plan, perplexity(plan))
    show("mc-smoe", plan, perplexity(plan, merge(live, anatomy, plan, longer)))


if __name__ == "__main__":
    main(*sys.argv[1:])
