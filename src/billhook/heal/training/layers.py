"""Full weights, a few blocks at a time: who is trained in each period."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from billhook.heal.training.fpf import fpf
from billhook.heal.training.ist import ist, most_important
from billhook.heal.training.lisa import lisa
from billhook.heal.training.methods import Training
from billhook.heal.training.student import Student
from billhook.heal.training.weights import Weights


class Layers:
    """The weights of the blocks of a student; ``choose`` says which are trained from now on. ``facts`` is what it must
    remember across a crash."""

    def __init__(self, student: Student, weights: Weights, before: Mapping[str, Tensor], training: Training) -> None:
        """``before``: for fpf the tensors that the training began with, by name."""
        self.facts: dict[str, Any] = {"chosen": [], "importance": [0.0] * len(student.blocks)}
        self._student, self._weights, self._before, self._training = student, weights, before, training
        prefixes = [f"{path}." for path in student.paths]
        self._of = [[name for name in weights.names if name.startswith(prefix)] for prefix in prefixes]

    def choose(self, period: int, ids: Tensor) -> None:
        """``ids`` are windows to look at."""
        training, blocks = self._training, len(self._of)
        if training.trains == "lisa":
            names = self._in(lisa(blocks, training.blocks, period, training.seed))
        elif training.trains == "ist":
            self.facts["importance"] = ist(
                self.facts["importance"],
                self._student.blocks,
                lambda: self._loss(ids),
                training.blocks,
                f"{training.seed}.{period}",
            )
            names = self._in(most_important(self.facts["importance"], training.blocks))
        elif period == 0:
            names = self._weights.names
        elif period == 1:
            names = fpf(self._before, self._weights.parameters, len(self._weights.names) * training.blocks // blocks)
        else:
            return
        self.facts = {**self.facts, "chosen": names}
        self._weights.choose(names)

    def resume(self, facts: dict[str, Any], trained: Container[str]) -> None:
        """As when these were the ``facts`` and every block with weights that are ``trained`` had had a turn; what came
        of it is to be put in their place."""
        for names in self._of:
            if any(name in trained for name in names):
                self._weights.choose(names)
        self.facts = facts
        self._weights.choose(facts["chosen"])

    def _in(self, blocks: list[int]) -> list[str]:
        return [name for block in blocks for name in self._of[block]]

    @torch.no_grad()
    def _loss(self, ids: Tensor) -> float:
        with self._student.computing():
            return self._student.parts(ids)[0].item()
