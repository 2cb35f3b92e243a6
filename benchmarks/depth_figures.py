"""WikiText-2 perplexity of SmolLM2-135M after depth cuts, every method on the same calibration.

    python benchmarks/depth_figures.py [MODEL] [TEXT] [SKIP] [RECIPE ...]      (default: demo wiki_calib.txt.gz 0)

Block influence with 3, 6 and 8 of 30 blocks gone; then the recipes (all that drop blocks or sublayers and put nothing
in their place, if none is named) at 20% of the block parameters, the baselines and the cheap searches first. Nothing is
healed. C4 documents as a second domain. An hour on two idle cores for all; interrupted, the searches go on where they
were.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

from protocol import DATA, LENGTH, bed

from billhook.data import windows as windows_of
from billhook.plan.budget import Budget
from billhook.plan.errors import InputError
from billhook.recipes import catalogue
from billhook.recipes.find import find
from billhook.recipes.measures import watch
from billhook.recipes.schema import Recipe
from billhook.recipes.settings import CALIBRATION_LENGTH, CALIBRATION_TOKENS
from billhook.scores import Unit
from billhook.search import pose

FIRST = ("sublayer-greedy", "random", "evenly-spaced", "first", "last")
DEAR = ("block-greedy", "additive-knapsack", "position-weighted", "finercut", "evopress")


def of_depth(recipe: Recipe) -> bool:
    """Whether it drops whole blocks or sublayers, and none of them runs on with other weights."""
    return recipe.unit in get_args(Unit) and not recipe.returns and recipe.act != "share"


def main(source: str = "demo", text: str = "wiki_calib.txt.gz", skip: str = "0", *recipes: str) -> None:
    for name in recipes:
        if not of_depth(catalogue.load(name)):
            raise InputError(f"recipe {name} is none of depth; this benchmark drops blocks and sublayers alone")
    b = bed(source)
    windows = b.calibrated(CALIBRATION_TOKENS, CALIBRATION_LENGTH, text, int(skip))
    c4 = windows_of(DATA / "c4_docs.jsonl.gz", b.model.tokenizer, tokens=4 * LENGTH, length=LENGTH)
    seen = watch(b.model, windows, None)
    per_pass = windows.ids.numel() * len(b.anatomy.stack("decoder").blocks)
    place = Path("out/benchmarks/depth-figures")
    place.mkdir(parents=True, exist_ok=True)
    print(
        f"calibrated on {windows.ids.numel()} tokens of {text}, windows of {windows.ids.shape[1]} from number {skip} on"
    )
    print(
        f"{'recipe':<24} {'budget':<12} {'realised':>8} {'WikiText-2':>10} {'C4':>7} {'passes':>7}  dropped", flush=True
    )
    print(f"{'dense':<24} {'':<12} {1:>8} {b.perplexity():>10.2f} {b.perplexity(test=c4):>7.2f}", flush=True)
    asked = [("block-influence", f"blocks={n}") for n in (27, 24, 22)]
    names = recipes or sorted(
        (recipe.name for recipe in catalogue.recipes() if of_depth(recipe)),
        key=lambda name: (name in DEAR, name not in FIRST, name),
    )
    asked += [(name, "params=0.8") for name in names]
    for name, budget in asked:
        recipe = catalogue.load(name)
        problem = pose(b.anatomy.outline, Budget.parse(budget), recipe.unit)
        choice = find(recipe, b.model, problem, windows, seen, seed=0, place=place, progress=None)
        drops = choice.found.drops
        realised = choice.found.steps[-1].realised["params"]
        print(
            f"{name:<24} {budget:<12} {realised:>8.3f} {b.perplexity(drops):>10.2f} {b.perplexity(drops, c4):>7.2f} "
            f"{choice.found.work / per_pass:>7.1f}  {' '.join(str(d).removeprefix('decoder.') for d in sorted(drops))}",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
