"""What several looks at one model have in common is measured once, and charged once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")


class Once:
    """Statistics of one model over one text, by what they depend on besides."""

    def __init__(self) -> None:
        self._taken: dict[Hashable, Any] = {}

    def __call__(self, key: Hashable, take: Callable[[], tuple[T, int]]) -> tuple[T, int]:
        """What ``take`` gives, with the work behind it; the same again, without work, when a ``key`` comes back."""
        if key in self._taken:
            return self._taken[key], 0
        found, work = take()
        self._taken[key] = found
        return found, work
