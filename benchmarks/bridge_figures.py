"""What a map of low rank across a gap gives back where nothing can be folded into what writes: a sentence encoder
whose norms stand on the stream (all-MiniLM-L6-v2), each pair of neighbouring blocks gone.

    python benchmarks/bridge_figures.py FOLDER [TOKENS]  (default: 24576)

FOLDER is an ordinary transformers folder of the model. Fitted on Wikipedia text, judged on other text of it and on C4,
windows of 128 tokens, each mean-pooled to one vector: the mean cosine with the dense model's vector, and the share of
windows whose vector is nearest to the dense model's of the same window among those of all. A minute or two on one core.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from protocol import DATA
from torch import Tensor
from torch.nn.functional import normalize

from billhook.data import Windows, windows
from billhook.heal import UNTOUCHED, Healing, bridge, closed_form, healed
from billhook.plan.address import Address
from billhook.plan.plan import Plan
from billhook.recipes.opened import Opened, opened
from billhook.surgery import simulate

LENGTH, TESTED = 128, 200
TEXTS = {"WikiText-2": "wikitext2_raw_test.txt.gz", "C4": "c4_docs.jsonl.gz"}
WAYS: dict[str, Callable[..., Healing]] = {"closed-form": closed_form, "bridge": bridge}


def main(folder: str, tokens: str = "24576") -> int:
    model = opened(folder, dtype="float32", device="cpu", trust_remote_code=False)
    fit = read(model, "wiki_calib.txt.gz", int(tokens))
    tests = {name: read(model, file, TESTED * LENGTH) for name, file in TEXTS.items()}
    wanted = {name: vectors(model.model, text) for name, text in tests.items()}
    (stack,) = model.anatomy.stacks
    heads = "".join(f"{name + ' cosine':>20} {'found':>7}" for name in tests)
    print(f"{'gone':<8} {'':<12}{heads}{'seconds':>9}")
    worse = False
    for first in range(1, len(stack.blocks) - 1):
        plan = Plan.of([Address(stack.name, first), Address(stack.name, first + 1)])
        before: list[float] = []
        for way in ("cut", *WAYS):
            begun = time.perf_counter()
            healing = WAYS[way](model.model, model.anatomy, plan, fit) if way in WAYS else UNTOUCHED
            seconds = time.perf_counter() - begun
            with healed(model.model, healing), simulate(model.model, model.anatomy, plan):
                now = {name: vectors(model.model, text) for name, text in tests.items()}
            found = [likeness(wanted[name], now[name]) for name in tests]
            told = "".join(f"{cosine:>20.3f} {share:>7.1%}" for cosine, share in found)
            print(f"{f'{first}, {first + 1}':<8} {way:<12}{told}{seconds:>9.0f}", flush=True)
            worse |= bool(before) and any(cosine < b for (cosine, _), b in zip(found, before, strict=True))
            before = before or [cosine for cosine, _ in found]
    print(f"healing made nothing worse: {'no' if worse else 'yes'}")
    return 1 if worse else 0


def read(model: Opened, file: str, tokens: int) -> Windows:
    return windows(DATA / file, model.tokenizer, tokens=tokens, length=LENGTH)


@torch.no_grad()
def vectors(model: Any, text: Windows) -> Tensor:
    """Of each window [windows, hidden], of length 1."""
    found = [model(input_ids=ids).last_hidden_state.mean(1) for ids in torch.split(text.ids, 20)]
    return normalize(torch.cat(found), dim=-1)


def likeness(dense: Tensor, now: Tensor) -> tuple[float, float]:
    nearest = (now @ dense.T).argmax(-1)
    share = (nearest == torch.arange(len(dense))).float().mean().item()
    return (dense * now).sum(-1).mean().item(), share


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
