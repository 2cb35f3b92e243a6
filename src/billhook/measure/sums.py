"""What a pass over the calibration leaves behind: sums and counts, so that parts of it add up exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from billhook.plan.address import Address
from billhook.plan.errors import InputError

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class Mean:
    """A sum over ``count`` tokens, in float64."""

    total: float
    count: int

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        return self.total / self.count


@dataclass(frozen=True)
class Angles:
    """For one stack of n blocks: ``total`` float64 [n + 1, n + 1] is the angular distance between the stream at two
    block inputs (the last one: behind the last block), summed over ``count`` tokens."""

    total: Tensor
    count: int

    def __add__(self, other: Angles) -> Angles:
        return Angles(self.total + other.total, self.count + other.count)


@dataclass(frozen=True)
class Trace:
    """Statistics of units over the calibration. Traces of different batches or processes add up.

    ``figures`` maps the name of a statistic to its mean for each unit: ``cosine``, ``update``, ``update_share`` (see
    ``measure.trace``) and the kinds of damage (see ``measure.ablation``). A unit that the calibration never reached is
    not in it: unknown, which is not the same as unimportant. ``work`` counts block-token forwards.
    """

    figures: Mapping[str, Mapping[Address, Mean]] = field(default_factory=dict)
    angles: Mapping[str, Angles] = field(default_factory=dict)
    work: int = 0

    def __add__(self, other: Trace) -> Trace:
        figures = _merged(self.figures, other.figures, lambda a, b: _merged(a, b, Mean.__add__))
        return Trace(figures, _merged(self.angles, other.angles, Angles.__add__), self.work + other.work)

    def means(self, name: str) -> dict[Address, float]:
        """A statistic by unit, in order of address. InputError if it was not taken."""
        if name not in self.figures:
            raise InputError(f"the trace has no {name}; it has {', '.join(sorted(self.figures)) or 'no figures'}")
        return {unit: mean.value for unit, mean in sorted(self.figures[name].items())}

    def angular(self, stack: str) -> list[list[float]]:
        """Mean angular distance, from 0 to 1, between the inputs of block i and of block i + n: ``[n - 1][i]``.

        InputError if it was not taken for this stack.
        """
        if stack not in self.angles:
            raise InputError(
                f"the trace has no angular distances of {stack}; it has {', '.join(self.angles) or 'none'}"
            )
        mean = self.angles[stack].total / self.angles[stack].count
        return [torch.diagonal(mean, n).tolist() for n in range(1, len(mean))]

    @classmethod
    def of_damage(cls, kind: str, rises: Mapping[Address, float], tokens: int) -> Trace:
        """The result of an ablation over so many tokens, to be added to a trace."""
        return cls({kind: {unit: Mean(rise * tokens, tokens) for unit, rise in rises.items()}})


def _merged(one: Mapping[K, V], other: Mapping[K, V], add: Callable[[V, V], V]) -> dict[K, V]:
    return {**one, **{key: add(one[key], value) if key in one else value for key, value in other.items()}}
