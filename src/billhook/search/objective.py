"""What a search minimises. Strategies know addresses and figures, no models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from billhook.plan.address import Address

Progress = Callable[[str, int, int], None]
Drops = frozenset[Address]


class Change(Protocol):
    """One of the changes that a solution is the set of: a unit that goes, or a sublayer that gets narrower. Hashable,
    in a fixed order, and ``str`` names it."""

    def __lt__(self, other: Any, /) -> bool: ...


C = TypeVar("C", bound=Change)
C_contra = TypeVar("C_contra", bound=Change, contravariant=True)


class Objective(Protocol[C_contra]):
    """A figure of a model as units are dropped: low is good, infinite where the model is broken, never NaN.

    The figure is a function of what is dropped alone. ``work`` counts block-token forwards so far; what a call adds to
    it may depend on the committed drops and on the call before, on nothing else, so that a resumed search counts alike.
    The less a set of drops differs from the committed one, and the deeper, the cheaper it is.
    """

    @property
    def work(self) -> int: ...

    def at(self, drops: frozenset[C_contra]) -> float:
        """The figure with exactly these drops; nothing is committed."""

    def move(self, drops: frozenset[C_contra]) -> None:
        """Commit exactly these drops, units committed before and not among them coming back."""
