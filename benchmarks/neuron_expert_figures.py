"""Do neurons chosen for each token by one router in front of all blocks beat as many that are the same for all tokens?
Perplexity on WikiText-2 raw test and on C4 under neuron-experts, with half and three quarters of every MLP's neurons.

    python benchmarks/neuron_expert_figures.py [MODEL] [FITTED] [JUDGED] [EXPERTS]   (default: demo, 8192, 4096, 4)

Beside the experts and their router stand: one expert for all tokens, found in the same way; the same experts under a
router that is drawn; and experts that are drawn, under the router. Found once, at half, on FITTED tokens, half of
wiki_calib and half of c4_calib, and judged on JUDGED tokens of either text, of C4 later ones. Minutes on a quiet core.
"""

from __future__ import annotations

import math
import sys

import torch
from protocol import DATA

from billhook.data import Windows, windows
from billhook.recipes.opened import opened
from billhook.runtime.neuron_experts import NeuronExperts

SHARES = (0.5, 0.75)
LENGTH = 256


def main(source: str = "demo", fitted: str = "8192", judged: str = "4096", experts: str = "4") -> None:
    model = opened(source, dtype=None, device="cpu", trust_remote_code=False)
    live, anatomy, half, count = model.model, model.anatomy, int(fitted) // 2, int(experts)

    def read(name: str, tokens: int, length: int, skip: int = 0) -> torch.Tensor:
        return windows(DATA / name, model.tokenizer, tokens=tokens, length=length, skip=skip).ids

    seen = torch.cat([read(name, half, 128) for name in ("wiki_calib.txt.gz", "c4_calib.txt.gz")])
    text = Windows.of(seen, "wiki_calib and c4_calib")
    later = -(-half // LENGTH)
    tests = (
        read("wikitext2_raw_test.txt.gz", int(judged), LENGTH),
        read("c4_calib.txt.gz", int(judged), LENGTH, skip=later),
    )

    @torch.inference_mode()
    def perplexity(ids: torch.Tensor) -> float:
        total = 0.0
        for rows in torch.split(ids, 4):
            logits = live(rows, use_cache=False).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
            total += loss.item()
        return math.exp(total / (ids.numel() - len(ids)))

    def show(name: str, *figures: float) -> None:
        print(f"{name:<44}" + "".join(f"{figure:>12.1f}" for figure in figures), flush=True)

    print(f"{'':<44}{'WikiText-2':>12}{'C4':>12}")
    show("all neurons", *map(perplexity, tests))
    found = NeuronExperts(experts=count, keep=SHARES[0]).fitted(live, anatomy, text)
    tensors, draw = found.tensors(), torch.Generator().manual_seed(0)
    router = {**tensors, "router.weight": torch.randn(tensors["router.weight"].shape, generator=draw)}
    drawn = {n: torch.rand(t.shape, generator=draw) if n.endswith(".worth") else t for n, t in tensors.items()}
    policies = {
        f"{count} experts and their router": found,
        "one expert for all tokens": NeuronExperts(experts=1, keep=SHARES[0]).fitted(live, anatomy, text),
        f"the {count} experts under a router that is drawn": found.with_tensors(router),
        f"{count} experts that are drawn": found.with_tensors(drawn),
    }
    for share in SHARES:
        for name, policy in policies.items():
            with policy.turned(share).attach(live, anatomy):
                show(f"{share:.0%}: {name}", *map(perplexity, tests))


if __name__ == "__main__":
    main(*sys.argv[1:])
