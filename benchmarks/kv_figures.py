"""Does training on keys and values of earlier blocks let a model do with less cache? Perplexity on WikiText-2 raw test
of the model as it is and trained by kv-routing, each plainly and under kv-share with spans of 2 and 4.

    python benchmarks/kv_figures.py [MODEL] [TOKENS] [WINDOW]     (default: the demo model, 100000, 512)

It learns from the model's own distribution (adapters, merged), on wiki_calib; without sharing there would be nothing
to learn. A few minutes for a model of five million parameters.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from protocol import DATA

from billhook.anatomy import discover
from billhook.data import windows
from billhook.evaluate.policy_quality import savings
from billhook.heal import UNTOUCHED, healed
from billhook.heal.training.methods import METHODS
from billhook.heal.training.train import train
from billhook.models import load
from billhook.plan.plan import Plan
from billhook.runtime.kv_share import KvShare

SPANS = (1, 2, 4)
JUDGED = 16384


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: torch.Tensor) -> float:
    total = sum(
        torch.nn.functional.cross_entropy(model(row[None], use_cache=False).logits[0, :-1].float(), row[1:]).item()
        for row in ids
    )
    return float(torch.tensor(total / len(ids)).exp())


def main(source: str = "demo", tokens: str = "100000", window: str = "512") -> None:
    loaded, length = load(source, dtype=torch.float32), int(window)
    model, anatomy = loaded.model, discover(loaded.model)
    judged = windows(DATA / "wikitext2_raw_test.txt.gz", loaded.tokenizer, tokens=JUDGED, length=length).ids
    text = windows(
        DATA / "wiki_calib.txt.gz", loaded.tokenizer, tokens=int(tokens) * 8 // 7 + 2 * length, length=length
    )
    policies = [KvShare(span=span) for span in SPANS]
    caches = []
    for policy in policies:
        with policy.attach(model, anatomy) as attached:
            caches.append(f"{savings(attached.counts, model, anatomy, length).kv_bytes:.0%} of the cache")
    print(f"{'':<28}" + "".join(f"{cache:>20}" for cache in caches))
    for name in ("as it is", "kv-routing"):
        healing = UNTOUCHED
        if name in METHODS:
            training = replace(METHODS[name], patience=99)
            with tempfile.TemporaryDirectory() as place:
                healing, _ = train(
                    model, anatomy, Plan.of([]), UNTOUCHED, text, training, tokens=int(tokens), state=Path(place) / "s"
                )
        with healed(model, healing):
            figures = []
            for policy in policies:
                with policy.attach(model, anatomy):
                    figures.append(perplexity(model, judged))
        print(f"{name:<28}" + "".join(f"{figure:>20.2f}" for figure in figures), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
