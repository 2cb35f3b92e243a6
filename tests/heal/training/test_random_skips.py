"""Trained with blocks missing, a model bears patterns that it never saw; nothing is stepped around outside a step."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from families import build
from heal.training.training_bed import require_hardened, text

from billhook.anatomy import discover
from billhook.heal.training.random_skips import stepped_around
from billhook.plan.address import Address
from billhook.surgery import simulate


def without(number: int, model: Any) -> AbstractContextManager[Any]:
    return simulate(model, discover(model), [Address("decoder", number)])


def test_skipping_hurts_less_after_training_with_skips(tmp_path: Path) -> None:
    """Without one block or another of those that the cut has left."""
    require_hardened("skips", "skips", 120, [partial(without, number) for number in (1, 2)], tmp_path)


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
