"""What one scalar for each sublayer that stays gives back: WikiText-2 perplexity of SmolLM2-135M, cut, and with gains.

    python benchmarks/gain_figures.py [MODEL] [DTYPE] [STEPS] [WINDOWS] [TOKENS]   (default: demo bfloat16 24 16 3072)

A fifth of the block parameters gone as the sublayers that lazy greedy over all of them finds, as blocks 13 to 18, and
as those that block influence chose on 3,072 tokens. Gains are fitted on windows of 512 tokens of the calibration text.
Ten minutes on two idle cores.
"""

from __future__ import annotations

import sys

from heal_figures import SUBLAYERS
from protocol import LENGTH, Bed, bed

from billhook.data import Windows
from billhook.heal import healed
from billhook.heal.combining.gains import gains_of
from billhook.plan.plan import Plan
from billhook.recipes.opened import opened


def main(
    source: str = "demo", dtype: str = "bfloat16", steps: str = "24", windows: str = "16", tokens: str = "3072"
) -> None:
    b = bed(source)
    if dtype != "bfloat16":
        b = Bed(opened(source, dtype=dtype, device="cpu", trust_remote_code=False), b.test)
    test = Windows.of(b.test.ids[: int(windows)], "WikiText-2")
    text = b.calibrated(int(tokens), 512)
    print(f"{steps} steps on windows of {text.ids.shape[1]}; {windows} windows of {LENGTH} of WikiText-2 in {dtype}")
    plans = {"sublayers by greedy": SUBLAYERS, "blocks 13 to 18": [f"decoder.{i}" for i in range(13, 19)]}
    plans["blocks 12 to 17"] = [f"decoder.{i}" for i in range(12, 18)]
    for name, units in plans.items():
        plan = Plan.of(units)
        cut = b.perplexity(plan.drops, test)
        healing, fitted = gains_of(b.live, b.anatomy, plan, text, int(steps))
        with healed(b.live, healing):
            now = b.perplexity(plan.drops, test)
        low, high = min(fitted.values()), max(fitted.values())
        print(f"{name:<22} {cut:>8.2f}   with gains ({low:.2f} to {high:.2f}) {now:>8.2f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
