"""The protocol that the figures share: SmolLM2-135M, WikiText-2, windows of 1,024, no BOS; in bfloat16, which is
computed in float32 where the processor would only emulate it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from billhook.anatomy import Anatomy
from billhook.data import Windows, windows
from billhook.plan.address import Address
from billhook.plan.plan import Plan
from billhook.recipes.opened import Opened, opened
from billhook.surgery import simulate

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LENGTH = 1024
WINDOWS = 16


@dataclass(frozen=True)
class Bed:
    """The model and the texts that a figure is taken on."""

    model: Opened
    test: Windows

    @property
    def live(self) -> Any:
        return self.model.model

    @property
    def anatomy(self) -> Anatomy:
        return self.model.anatomy

    def calibrated(self, tokens: int, length: int = LENGTH, text: str = "wiki_calib.txt.gz", skip: int = 0) -> Windows:
        """The first windows of a text, after ``skip`` of them."""
        return windows(DATA / text, self.model.tokenizer, tokens=tokens, length=length, skip=skip)

    def perplexity(self, plan: Plan | Iterable[Address] = (), test: Windows | None = None) -> float:
        """Per token, over non-overlapping windows, the first token of each unpredicted."""
        total, count = 0.0, 0
        with torch.inference_mode(), simulate(self.live, self.anatomy, plan):
            for ids in (test or self.test).ids:
                logits = self.live(ids[None]).logits[0, :-1]
                for part, targets in zip(logits.split(256), ids[1:].split(256), strict=True):
                    total += torch.nn.functional.cross_entropy(part.float(), targets, reduction="sum").item()
                count += len(ids) - 1
        return math.exp(total / count)


def bed(source: str = "demo") -> Bed:
    """Everything ready. Needs the test data beside the checkout."""
    model = opened(source, dtype=None, device="cpu", trust_remote_code=False)
    test = windows(DATA / "wikitext2_raw_test.txt.gz", model.tokenizer, tokens=WINDOWS * LENGTH, length=LENGTH)
    return Bed(model, test)
