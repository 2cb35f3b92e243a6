"""Is lazy greedy with prefix reuse as good as plain greedy, for a fraction of the work?

Drops a fifth of the block parameters of the demo model by single sublayers, once with plain greedy (every candidate
evaluated anew after every removal, always through the whole model) and once with the default recipe, and
compares the work in block-token forwards and the perplexity on text that neither has seen. What plain greedy chooses
does not depend on how its forwards are computed, so they are computed with prefix reuse here, and counted in full.

    python benchmarks/lazy_greedy.py [MODEL] [TOKENS] [LENGTH]      (default: demo 1536 512)

About half an hour on two idle cores, nearly all of it for plain greedy; interrupted, it goes on where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path

from protocol import bed

from billhook.measure.ablation import Ablator
from billhook.measure.sums import Trace
from billhook.plan.address import Address
from billhook.plan.budget import Budget
from billhook.recipes import catalogue
from billhook.recipes.choices import Greedy
from billhook.recipes.find import find
from billhook.search import Ledger, Memo, greedy, pose

WORK, QUALITY = 12.0, 1.01


class Counted:
    """An objective that counts each evaluation as one pass through all blocks that are left."""

    def __init__(self, objective: Ablator, blocks: int) -> None:
        self.objective, self.blocks, self.work = objective, blocks, objective.work

    def at(self, drops: frozenset[Address]) -> float:
        gone = {u.parent for u in drops if {Address("decoder", u.block, k) for k in ("attention", "mlp")} <= drops}
        self.work += (self.blocks - len(gone)) * self.objective.replay.tokens
        return self.objective.at(drops)

    def move(self, drops: frozenset[Address]) -> None:
        self.objective.move(drops)


def main(source: str = "demo", tokens: int = 1536, length: int = 512) -> int:
    b = bed(source)
    windows = b.calibrated(tokens, length)
    problem = pose(b.anatomy.outline, Budget.parse("params=0.8"))
    blocks = len(b.anatomy.stack("decoder").blocks)
    place = Path(f"out/benchmarks/lazy-greedy-{tokens}-{length}")
    place.mkdir(parents=True, exist_ok=True)

    lazy, plain = (
        catalogue.load("sublayer-greedy"),
        catalogue.load(Path(__file__).with_name("sublayer-greedy-plain.yaml")),
    )
    found = {"lazy": find(lazy, b.model, problem, windows, Trace(), seed=0, place=place, progress=_tell).found}
    objective = Counted(Ablator(b.live, b.anatomy, windows, lazy.objective or "kl"), blocks)
    ledger = Ledger(place / "plain.jsonl", {"calibration": windows.fingerprint})
    assert isinstance(plain.choice, Greedy)
    found["plain"] = greedy(problem, Memo(objective, ledger), lazy=False, per=plain.choice.per, progress=_tell)
    dense = b.perplexity()
    print(
        f"\n{source}, {tokens} tokens of calibration in windows of {length}; WikiText-2 perplexity, dense {dense:.2f}"
    )
    print(f"{'greedy':>7} {'evaluations':>12} {'block-token forwards':>21} {'of dense passes':>16} {'perplexity':>11}")
    perplexity = {}
    for name, result in found.items():
        perplexity[name] = b.perplexity(result.drops)
        passes = result.work / (blocks * windows.ids.numel())
        print(f"{name:>7} {result.evaluations:>12} {result.work:>21,} {passes:>16.1f} {perplexity[name]:>11.2f}")
        print(f"        drops {' '.join(map(str, sorted(result.drops)))}")
    ratio = found["plain"].work / found["lazy"].work
    worse = perplexity["lazy"] / perplexity["plain"]
    print(
        f"work: {ratio:.1f} times less (asked: {WORK}); perplexity: {worse:.4f} of plain's (asked: {QUALITY} or less)"
    )
    return 0 if ratio >= WORK and worse <= QUALITY else 1


def _tell(label: str, done: int, total: int) -> None:
    print(f"\r{label}: {done} of {total}   ", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "demo", *map(int, sys.argv[2:])))
