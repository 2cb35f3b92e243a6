"""Single weights that are learned to go: the steps of a short training, and the best state that came by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from billhook.anatomy.linears import Linear, linears
from billhook.anatomy.types import Anatomy
from billhook.data import Windows
from billhook.plan.address import Address
from billhook.plan.record import Look
from billhook.search.exchanged import Exchanged, Goal

Progress = Callable[[str, int, int], None]
LOOKS = 8  # at held-back text, on the way


@dataclass(frozen=True)
class State:
    """Of every linear, by name and in the shape of its weight: which weights stay (bool), and where they are new the
    weights of those that do, in the model's dtype."""

    masks: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]


class Rule(Protocol):
    """What is learned, and how. A step begins with ``given`` and ends with ``learn``."""

    def given(self, name: str, along: float) -> Tensor:
        """What a linear computes with in this step, in the shape and dtype of its weight; ``along`` is 0 at the first
        step and 1 at the last."""

    def learn(self, name: str, slope: Tensor, along: float) -> None:
        """The slope of the loss with respect to what was given."""

    def state(self) -> State:
        """What it would come to now."""


class Sparsified(Exchanged):
    """The language model with other weights in all linears of a stack, by sublayer in ``units``."""

    def __init__(self, model: Any, anatomy: Anatomy, stack: str, windows: Windows, goal: Goal) -> None:
        """See ``Exchanged``."""
        self.units: dict[Address, tuple[Linear, ...]] = {
            sublayer.address: linears(model, sublayer, block.path)
            for block in anatomy.stack(stack).blocks
            for sublayer in block.sublayers
        }
        self.linears = {linear.name: linear for mine in self.units.values() for linear in mine}
        super().__init__(model, anatomy, stack, self.linears, windows, goal)

    def look(self, state: State) -> float:
        """The mean loss on the held-back windows of the model as it would be saved."""
        return self.held_loss({name: self.sparse(state, name) for name in self.dense})

    def sparse(self, state: State, name: str) -> Tensor:
        return torch.where(state.masks[name], state.weights.get(name, self.dense[name]), 0)


def learned(
    held: Sparsified, rule: Rule, *, steps: int, what: str, progress: Progress | None = None
) -> tuple[State, tuple[Look, ...]]:
    """Learn by a rule for so many steps, a window each, and return the state that does best on held-back text, the one
    at the start included, with all looks at it. Memory: what the rule holds, and the weights of the linears twice."""
    best = rule.state()
    curve: list[Look] = []
    losses: list[float] = []
    every = -(-steps // LOOKS)
    with held.opened():
        curve.append(Look(step=0, loss=None, held=held.look(best)))
        for step in range(steps):
            along = step / max(steps - 1, 1)
            loss, slopes = held.slopes({name: rule.given(name, along) for name in held.dense}, step)
            losses.append(loss)
            with torch.no_grad():
                for name in list(slopes):
                    rule.learn(name, slopes.pop(name), along)
            if (step + 1) % every == 0 or step + 1 == steps:
                state = rule.state()
                look = Look(step=step + 1, loss=sum(losses) / len(losses), held=held.look(state))
                best = state if look.held < min(seen.held for seen in curve) else best
                curve.append(look)
                losses = []
            if progress is not None:
                progress(what, step + 1, steps)
    return best, tuple(curve)
