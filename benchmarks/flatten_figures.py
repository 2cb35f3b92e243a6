"""What flattening keeps of blocks that go: WikiText-2 perplexity of SmolLM2-135M, cut, and flattened.

    python benchmarks/flatten_figures.py [MODEL] [DTYPE] [WINDOWS] [TOKENS]      (default: demo float32 16 20480)

Six of 30 blocks gone: the pairs of the recipe flatten-gpt, and the blocks of least influence whoever their neighbours
are, each first dropped and then flattened into the block behind, on TOKENS of the calibration text. Nothing is healed
otherwise.
"""

from __future__ import annotations

import sys
from pathlib import Path

from protocol import LENGTH, Bed, bed

from billhook.data import Windows
from billhook.heal import flatten, healed
from billhook.plan.budget import Budget
from billhook.recipes import catalogue
from billhook.recipes.find import find
from billhook.recipes.measures import watch
from billhook.recipes.opened import opened
from billhook.recipes.settings import CALIBRATION_LENGTH, CALIBRATION_TOKENS
from billhook.search import pose


def main(source: str = "demo", dtype: str = "float32", windows: str = "16", tokens: str = "20480") -> None:
    b = bed(source)
    b = Bed(opened(source, dtype=dtype, device="cpu", trust_remote_code=False), b.test)
    test = Windows.of(b.test.ids[: int(windows)], "WikiText-2")
    short = b.calibrated(CALIBRATION_TOKENS, CALIBRATION_LENGTH)
    text = b.calibrated(int(tokens), LENGTH)
    seen = watch(b.model, short, None)
    problem = pose(b.anatomy.outline, Budget.parse("blocks=24"), "block")
    print(f"{windows} windows of {LENGTH} of WikiText-2 in {dtype}; flattened on {text.ids.numel()} tokens")
    for name in ("flatten-gpt", "block-influence"):
        recipe = catalogue.load(name)
        found = find(recipe, b.model, problem, short, seen, seed=0, place=Path("out/benchmarks/flatten"), progress=None)
        drops = found.found.drops
        print(f"{name:<16} blocks {' '.join(str(unit.block) for unit in sorted(drops))}", flush=True)
        print(f"{'  dropped':<16} {b.perplexity(drops, test):>8.2f}", flush=True)
        healing = flatten(b.live, b.anatomy, drops, text)
        with healed(b.live, healing):
            print(f"{'  flattened':<16} {b.perplexity(drops, test):>8.2f}", flush=True)
        kept = [(graft.source, graft.into, graft.groups or graft.neurons) for graft in healing.grafts]
        print(f"  units that stay of each: {kept}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
