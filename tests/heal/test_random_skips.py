"""Trained with blocks missing, a model bears patterns that it never saw; nothing is stepped around outside a step."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from families import build
from heal.training_bed import PLAN, quick, text

from billhook.anatomy import discover
from billhook.heal import UNTOUCHED, Healing, healed
from billhook.heal.loop import split
from billhook.heal.random_skips import stepped_around
from billhook.heal.train import train
from billhook.plan.address import Address
from billhook.surgery import apply, simulate


def under_skips(healing: Healing) -> float:
    """KL from the dense model, nats a token of held-back text, mean over pairs of blocks of the cut model missing."""
    model = build("llama")
    anatomy = discover(model)
    _, held = split(text(64).ids)
    with torch.no_grad():
        dense = model(held).logits.log_softmax(-1)
        with healed(model, healing):
            cut = apply(model, anatomy, PLAN)
            smaller, total = discover(cut), 0.0
            for number in (1, 2):
                with simulate(cut, smaller, [Address("decoder", number)]):
                    found = cut(held).logits.log_softmax(-1)
                total += float((dense.exp() * (dense - found)).sum(-1).mean()) / 2
    return total


def test_skipping_hurts_less_after_training_with_skips(tmp_path: Path) -> None:
    results = {}
    for method, skips in (("skips", 0.5), ("plain", 0.0)):
        model = build("llama")
        training = quick("skips", rate=5e-3, skips=skips, rank=16, patience=9)
        results[method], record = train(
            model, discover(model), PLAN, UNTOUCHED, text(64), training, tokens=120 * 48, state=tmp_path / method
        )
        assert record.best > 0
        assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())
    assert under_skips(results["skips"]) < 0.9 * under_skips(results["plain"])
    assert under_skips(results["skips"]) < 0.7 * under_skips(UNTOUCHED)


def test_the_drawn_blocks_hand_on_and_the_ends_never_do() -> None:
    model = build("llama")
    layers = list(model.model.layers)
    ids = text().ids[:2]
    draw = next(str(n) for n in range(99) if _drawn(str(n)) == [False, True, False])
    with torch.no_grad(), stepped_around(layers, 0.5, draw):
        found = model(ids).logits
    with torch.no_grad(), simulate(model, discover(model), [Address("decoder", 2)]):
        assert torch.equal(found, model(ids).logits)
    with torch.no_grad(), stepped_around(layers, 1.0, "all"):
        most = model(ids).logits
    with torch.no_grad(), simulate(model, discover(model), [Address("decoder", i) for i in (1, 2, 3)]):
        assert torch.equal(most, model(ids).logits)
    assert not any(layer._forward_hooks for layer in layers)


def _drawn(draw: str) -> list[bool]:
    random = Random(draw)
    return [random.random() < 0.5 for _ in range(3)]
