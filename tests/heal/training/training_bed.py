"""A tiny model, cut, and text to train it on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from families import build

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.heal import UNTOUCHED, Healing, healed
from billhook.heal.training.loop import split
from billhook.heal.training.methods import METHODS, Training
from billhook.heal.training.train import train
from billhook.plan.plan import Plan
from billhook.plan.record import TrainingRecord
from billhook.surgery import apply

Way = Callable[[Any], AbstractContextManager[Any]]  # in which a model runs

PLAN = Plan.of(["decoder.1", "decoder.2.mlp"])
TOKENS = 12 * 48  # twelve steps of 4 windows of 12


def text(rows: int = 24, seed: int = 5) -> Windows:
    return Windows.of(torch.randint(3, 30, (rows, 12), generator=torch.Generator().manual_seed(seed)), "test")


def quick(method: str, **changes: Any) -> Training:
    return replace(METHODS[method], **{"checks": 3, "period": 4, "blocks": 2, "rank": 8, **changes})


def run(
    name: str, training: Training, state: Path, *, start: Healing = UNTOUCHED, windows: Windows | None = None,
    tokens: int = TOKENS, progress: Any = None,
) -> tuple[Any, Healing, TrainingRecord]:  # fmt: skip
    """The model, which is as before, and what the training of it gave."""
    model = build(name)
    found = train(
        model, discover(model), PLAN, start, windows or text(), training, tokens=tokens, state=state, progress=progress
    )
    return model, *found


def require_hardened(method: str, share: str, steps: int, ways: Sequence[Way], place: Path) -> None:
    """A model that was trained by a method, with half of the blocks run in its way, runs in these ways with less
    divergence than one that was trained with a ``share`` of none, and than an untrained one."""
    results = {}
    for name, value in (("hardened", 0.5), ("plain", 0.0)):
        training = quick(method, rate=5e-3, rank=16, patience=9, **{share: value})
        model, results[name], record = run("llama", training, place / name, windows=text(64), tokens=steps * 48)
        assert record.best > 0
        assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())
    hardened, plain, before = (_divergence(healing, ways) for healing in (*results.values(), UNTOUCHED))
    assert hardened < 0.9 * plain
    assert hardened < 0.7 * before


def _divergence(healing: Healing, ways: Sequence[Way]) -> float:
    """KL from the dense model, nats a token of held-back text, mean over the ways in which the cut model runs."""
    model = build("llama")
    anatomy = discover(model)
    _, held = split(text(64).ids)
    total = 0.0
    with torch.no_grad():
        dense = model(held).logits.log_softmax(-1)
        with healed(model, healing):
            cut = apply(model, anatomy, PLAN)
        for way in ways:
            with way(cut):
                found = cut(held).logits.log_softmax(-1)
            total += float((dense.exp() * (dense - found)).sum(-1).mean()) / len(ways)
    return total
