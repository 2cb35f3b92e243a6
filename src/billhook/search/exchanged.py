"""A language model with other weights in some places: its loss, and the slopes of that in these weights alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, nll_loss

from billhook.anatomy.types import Anatomy
from billhook.anatomy.undo import Undo, frozen
from billhook.data import Windows
from billhook.heal.training.loop import split
from billhook.plan.errors import InputError

Goal = Literal["loss", "kl"]


class Exchanged:
    """The weights of these ``names`` may be others inside ``opened``; ``dense`` are the model's own.

    ``work`` counts block-token forwards; a backward pass counts as two, since weights have slopes.
    """

    def __init__(
        self, model: Any, anatomy: Anatomy, stack: str, names: Iterable[str], windows: Windows, goal: Goal
    ) -> None:
        """``goal``: the next token of the text, or the dense model's distribution over it. The last eighth of the
        windows is held back. Raises InputError for a model that does not predict the next token of its own inputs, and
        for a single window."""
        of = anatomy.stack(stack)
        if anatomy.head is None or not of.causal or model.config.is_encoder_decoder:
            raise InputError(f"weights are learned on next tokens, which this {anatomy.family} model does not predict")
        self.model, self.goal, self.work = model, goal, 0
        self.dense = {name: model.get_parameter(name).detach() for name in names}
        self.fit, self.held = (ids.to(model.device) for ids in split(windows.ids))
        self._blocks = len(of.blocks)
        self._live: dict[str, nn.Parameter] = {}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Inside the context the model has weights of its own to be exchanged; then the old ones are back."""
        undo = Undo()
        try:
            with frozen(self.model):
                for name, dense in self.dense.items():
                    path, _, leaf = name.rpartition(".")
                    self._live[name] = nn.Parameter(dense)
                    undo.set(self.model.get_submodule(path), leaf, self._live[name])
                yield
        finally:
            undo.restore()
            self._live = {}

    def slopes(self, weights: Mapping[str, Tensor], row: int) -> tuple[float, dict[str, Tensor]]:
        """The loss on a window (numbers wrap around) with these weights, and its slope in each of them that has one.
        InputError where the loss is not finite."""
        ids = self.fit[row % len(self.fit)][None]
        with torch.no_grad():
            aim = self._predicted(self.dense, ids) if self.goal == "kl" else None
        with torch.enable_grad():
            loss = _loss(self._predicted(weights, ids), ids, aim)
            slopes = torch.autograd.grad(loss, list(self._live.values()), allow_unused=True)
        self.work += (3 + (aim is not None)) * self._blocks * ids.shape[1]
        if not loss.isfinite():
            raise InputError("the loss of the training is not finite: the weights or the text are damaged")
        named = zip(self._live, slopes, strict=True)
        return loss.item(), {name: slope for name, slope in named if slope is not None}

    @torch.no_grad()
    def held_loss(self, weights: Mapping[str, Tensor]) -> float:
        """The mean loss on the held-back windows with these weights, towards the goal."""
        total = torch.zeros((), dtype=torch.float64)
        for ids in torch.split(self.held, 1):
            aim = self._predicted(self.dense, ids) if self.goal == "kl" else None
            total += _loss(self._predicted(weights, ids), ids, aim).double().cpu()
        self.work += (1 + (self.goal == "kl")) * self._blocks * self.held.numel()
        return total.item() / len(self.held)

    def _predicted(self, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        for name, live in self._live.items():
            live.data = weights[name]
        return log_softmax(self.model(input_ids=ids, use_cache=False).logits[0, :-1].float(), -1)


def _loss(log_q: Tensor, ids: Tensor, aim: Tensor | None) -> Tensor:
    """Nats a token."""
    if aim is None:
        return nll_loss(log_q, ids[0, 1:])
    return (aim.exp() * (aim - log_q)).sum(-1).mean()
