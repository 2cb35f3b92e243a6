"""The cut model beside the dense one, and its loss as the forward of one module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy.types import Anatomy, Stack
from billhook.heal.training.distil import divergence, loss_on_text, stream_error
from billhook.heal.training.head import halves
from billhook.heal.training.methods import Goal
from billhook.measure.patch import observing
from billhook.plan.address import Address
from billhook.plan.check import survivors


class Student(nn.Module):
    """``model`` is what ``apply`` left of ``dense``; they share all weights that are not trained. The forward gives the
    mean loss a token over windows [rows, tokens]: that of the goal, and the weighted errors of the stream after the
    blocks that stay (``weights``, by their number in the smaller model). It is one module so that what wraps modules
    for training on several devices can wrap it; the dense model is deliberately no part of it.

    Everything runs in evaluation mode: no dropout, so a step has no chance in it.
    """

    def __init__(self, model: Any, dense: Any, ends: list[tuple[str, str]], goal: Goal) -> None:
        """``ends``: for each block that stays, its path, and that of the dense block whose output its own is to match
        (see ``ends_of``)."""
        super().__init__()
        self.model = model
        self.goal = goal
        self.weights: Mapping[int, float] = {}
        self._dense = (dense,)  # a tuple, so that it is not registered
        self._ends = ends

    @property
    def dense(self) -> Any:
        """The model to learn from."""
        return self._dense[0]

    def learn_from(self, dense: Any) -> None:
        self._dense = (dense,)

    @property
    def paths(self) -> list[str]:
        """Of the blocks that stay, in ``model``."""
        return [path for path, _ in self._ends]

    @property
    def blocks(self) -> list[nn.Module]:
        return [self.model.get_submodule(path) for path in self.paths]

    def forward(self, ids: Tensor) -> Tensor:
        with self.computing():
            loss, streams, wanted = self.parts(ids)
        for number, weight in self.weights.items():
            loss = loss + weight * stream_error(streams[number], wanted[number])
        return loss

    def computing(self) -> torch.autocast:
        """Weights that are trained are kept in float32 and computed with in the dtype of the model."""
        dense = self.dense
        return torch.autocast(dense.device.type, dtype=dense.dtype, enabled=dense.dtype != torch.float32)

    def parts(self, ids: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The loss of the goal, the stream after each block that stays, and what it should be (empty where only the
        text counts)."""
        hidden, head, streams = halves(self.model, ids, self.blocks)
        hidden = hidden[:, :-1].flatten(0, 1)
        if self.goal == "text":
            return loss_on_text(hidden, head, ids[:, 1:].flatten()), streams, []
        dense_hidden, dense_head, wanted = self._taught(ids)
        return divergence(hidden, head, dense_hidden[:, :-1].flatten(0, 1), dense_head), streams, wanted

    def _taught(self, ids: Tensor) -> Any:
        dense = self.dense
        ends = list(dict.fromkeys(path for _, path in self._ends))
        with observing(dense):
            hidden, head, found = halves(dense, ids, [dense.get_submodule(path) for path in ends])
        by_path = dict(zip(ends, found, strict=True))
        return hidden, head, [by_path[path] for _, path in self._ends]


def ends_of(anatomy: Anatomy, drops: frozenset[Address], stack: Stack) -> list[tuple[str, str]]:
    """For each block that stays: its path in the smaller model, and the path of the original block after which the
    dense stream is what its output should be. Before a gap that is the last block of the gap: the next block that
    stays reads there."""
    left = survivors(drops, anatomy.outline, stack.name)
    until = [*left[1:], len(stack.blocks)]
    return [(f"{stack.path}.{new}", stack.blocks[end - 1].path) for new, end in enumerate(until)]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient; leaving puts back which ones did."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad = True
