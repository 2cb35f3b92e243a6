"""What happens if a unit is not there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from billhook.anatomy.types import Anatomy
from billhook.data import Windows
from billhook.measure.batches import Batch
from billhook.measure.distances import OutputDistance
from billhook.measure.replay import Progress, Replay
from billhook.measure.teacher import Teacher
from billhook.plan.address import Address
from billhook.plan.plan import Keep, Plan
from billhook.surgery.simulate import simulate

Kind = Literal["kl", "loss", "stream", "turn", "angle", "euclidean", "jensen-shannon"]


class Ablator:
    """One figure for how far a model is from dense as units are dropped, over fixed inputs. Low is good, infinite where
    the stream or the output is not finite.

    - ``kl``: mean divergence of its next-token distributions from the dense ones, nats a token (see Teacher);
    - ``loss``: mean negative log-likelihood of the text, nats a token;
    - ``angle``, ``euclidean``, ``jensen-shannon``: mean distance of its logits from the dense ones (see
      ``measure.distances``);
    - ``stream``: squared error of the stream after the last block relative to the dense stream, for any model;
    - ``turn``: 1 - E[cos] of the stream after the last block and the dense one, over tokens, for any model (the Macro
      Influence of FuseGPT, arXiv 2411.14507, if a block is dropped).

    One evaluation costs the blocks after the first one affected and the head: twice for the three distances, never for
    ``stream`` and ``turn``.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        source: Windows | Iterable[Batch],
        kind: Kind = "kl",
        stack: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Runs the dense model once. Raises InputError for a kind that this model or stack does not have."""
        self.replay = Replay(model, anatomy, source, stack, progress)
        self.kind = kind
        self._judge = _judge(self.replay, kind)

    @property
    def work(self) -> int:
        """Block-token forwards so far, the dense pass included."""
        return self.replay.work

    def value(self) -> float:
        """The figure in the current state: 0 at first, but for ``loss``."""
        return self._judge(self.replay.final)

    def with_drop(self, unit: Address) -> float:
        """The figure of the current state with this unit dropped as well; the state stays."""
        return self.at(self.replay.state | {unit})

    def narrowed(self, *keeps: Keep) -> float:
        """The figure of the current state with these sublayers narrower as well; the state stays. Costs the first of
        their blocks and those after it."""
        with simulate(self.replay.model, self.replay.anatomy, Plan.of([], keeps=keeps)):
            return self._judge(self.replay.again(min(keep.unit.block for keep in keeps)))

    def at(self, drops: Iterable[Address]) -> float:
        """The figure with exactly these drops; the state stays."""
        return self._judge(self.replay.under(drops))

    def move(self, drops: Iterable[Address]) -> None:
        """Commit exactly these drops; units committed before and not among them come back."""
        self.replay.move(drops)


def ablation(ablator: Ablator, units: Iterable[Address], progress: Progress | None = None) -> dict[Address, float]:
    """By how much the figure rises if each unit alone is dropped from the current state.

    Cost: for each unit the blocks after it; n(n - 1)/2 block forwards for all n blocks, and n heads.
    """
    units = sorted(units)
    before = ablator.value()
    rises = {}
    for index, unit in enumerate(units):
        rises[unit] = ablator.with_drop(unit) - before
        if progress is not None:
            progress("one unit less", index + 1, len(units))
    return rises


def _judge(replay: Replay, kind: Kind) -> Callable[[list[Tensor]], float]:
    match kind:
        case "stream":
            return _stream_error(replay)
        case "turn":
            return _turn(replay)
        case "angle" | "euclidean" | "jensen-shannon":
            return OutputDistance(replay, kind)
    teacher = Teacher(replay)
    return lambda streams: getattr(teacher.damage(streams), kind)


def _stream_error(replay: Replay) -> Callable[[list[Tensor]], float]:
    dense = [stream[real].float() for stream, real in zip(replay.final, replay.real, strict=True)]
    energy = sum(stream.square().sum(dtype=torch.float64).item() for stream in dense)

    def error(streams: list[Tensor]) -> float:
        now = (stream[real].float() for stream, real in zip(streams, replay.real, strict=True))
        distances = (torch.dist(a, b).double().square().item() for a, b in zip(now, dense, strict=True))
        return _finite(sum(distances) / energy)

    return error


def _turn(replay: Replay) -> Callable[[list[Tensor]], float]:
    dense = [stream[real].float() for stream, real in zip(replay.final, replay.real, strict=True)]
    count = sum(len(stream) for stream in dense)

    def turn(streams: list[Tensor]) -> float:
        now = (stream[real].float() for stream, real in zip(streams, replay.real, strict=True))
        cosines = (
            torch.cosine_similarity(a, b, dim=-1).sum(dtype=torch.float64) for a, b in zip(now, dense, strict=True)
        )
        return _finite(1 - sum(cosine.item() for cosine in cosines) / count)

    return turn


def _finite(figure: float) -> float:
    """A broken model is infinitely far from dense, never NaN."""
    return figure if math.isfinite(figure) else math.inf
