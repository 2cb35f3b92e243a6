"""A tiny model, cut, and text to train it on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from families import build

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.heal import UNTOUCHED, Healing
from billhook.heal.train import train
from billhook.heal.training import METHODS, Training
from billhook.plan.plan import Plan
from billhook.plan.record import TrainingRecord

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
