"""What a search minimises. Strategies know addresses and figures, no models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from billhook.plan.address import Address

Progress = Callable[[str, int, int], None]
Drops = frozenset[Address]


class Objective(Protocol):
    """A figure of a model as units are dropped: low is good, infinite where the model is broken, never NaN.

    The figure is a function of what is dropped alone. ``work`` counts block-token forwards so far; what a call adds to
    it may depend on the committed drops and on the call before, on nothing else, so that a resumed search counts alike.
    """

    @property
    def work(self) -> int: ...

    def value(self) -> float:
        """The figure with the committed drops."""

    def with_drop(self, unit: Address) -> float:
        """The figure with ``unit`` dropped as well; nothing is committed."""

    def move(self, drops: Drops) -> None:
        """Commit exactly these drops, units committed before and not among them coming back."""
