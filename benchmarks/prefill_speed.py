"""Does dropping n of N blocks speed a prefill by what the blocks cost?

Prints, for n = 3, 6, 10, the measured speed-up, the ideal one (from the measured time outside the blocks) and their
ratio, which has to be at least 0.9. About a minute on two idle CPU cores; on a busy machine set OMP_NUM_THREADS=1.

    python benchmarks/prefill_speed.py [MODEL]      (default: the demo model)
"""

from __future__ import annotations

import sys

import torch

from billhook.anatomy import discover
from billhook.evaluate.bench import bench
from billhook.evaluate.workload import PREFILL
from billhook.models import load
from billhook.plan.plan import Plan
from billhook.surgery import apply

REQUIRED = 0.9


def main(source: str) -> int:
    dense = load(source, dtype=torch.bfloat16).model
    anatomy = discover(dense)
    count = len(anatomy.stack("decoder").blocks)
    print(f"{source}: prefill of {PREFILL.prompt_tokens} tokens, {count} blocks")
    print(f"{'dropped':>8} {'speed-up':>9} {'quartiles':>15} {'ideal':>6} {'of ideal':>9}")
    worst = 1.0
    for dropped in (3, 6, 10):
        plan = Plan.of(f"decoder.{count - 2 - i}" for i in range(dropped))
        (timing,) = bench(dense, apply(dense, anatomy, plan), workloads=[PREFILL], rounds=9, plan=plan)
        assert timing.ideal_speedup is not None
        speed, ideal = timing.speedup, timing.ideal_speedup
        share = speed.value / ideal
        worst = min(worst, share)
        print(f"{dropped:>8} {speed.value:>9.3f} {speed.low:>7.3f} {speed.high:>7.3f} {ideal:>6.3f} {share:>9.3f}")
    print(timing.engine)
    print(f"at least {REQUIRED} of the ideal everywhere: {'yes' if worst >= REQUIRED else 'no'}")
    return 0 if worst >= REQUIRED else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "demo"))
