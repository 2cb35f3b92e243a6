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
from billhook.plan.budget import Budget
from billhook.plan.plan import Plan
from billhook.plan.target import Target
from billhook.recipes import catalogue
from billhook.recipes.find import Choice, find, pose_for
from billhook.recipes.measures import watch
from billhook.recipes.opened import Opened, opened
from billhook.recipes.settings import CALIBRATION_LENGTH, CALIBRATION_TOKENS, HEALING_TOKENS
from billhook.surgery import simulate

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LENGTH = 1024
WINDOWS = 16
WORK = Path("out/benchmarks")


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

    @property
    def c4(self) -> Windows:
        """The second domain."""
        return windows(DATA / "c4_docs.jsonl.gz", self.model.tokenizer, tokens=4 * LENGTH, length=LENGTH)

    def chosen(
        self,
        name: str,
        budget: str,
        target: Target = Target.REMOTE,
        *,
        text: str = "wiki_calib.txt.gz",
        skip: int = 0,
        tokens: int = CALIBRATION_TOKENS,
        survey: int = HEALING_TOKENS,
        lessons: Windows | None = None,
    ) -> Choice:
        """What a recipe chooses, on as much text as ``compress`` reads unless told."""
        recipe = catalogue.load(name)
        problem = pose_for(recipe, self.anatomy.outline, Budget.parse(budget), target)
        short, long = (self.calibrated(n, CALIBRATION_LENGTH, text, skip) for n in (tokens, survey))
        seen = watch(self.model, short, None)
        return find(
            recipe,
            self.model,
            problem,
            short,
            seen,
            seed=0,
            place=WORK,
            progress=None,
            survey=long,
            lessons=lessons,
        )

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
