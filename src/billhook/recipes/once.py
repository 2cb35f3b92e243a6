"""What several looks at one model have in common is measured once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")


class Once:
    """Statistics of one model over one text, by what they depend on besides. They are charged once; with ``each`` to
    every look, as if it had been the only one."""

    def __init__(self, *, each: bool = False) -> None:
        self._each = each
        self._taken: dict[Hashable, tuple[Any, int]] = {}

    def __call__(self, key: Hashable, take: Callable[[], tuple[T, int]]) -> tuple[T, int]:
        """What ``take`` gives, with the work behind it; when a ``key`` comes back the same again, nothing done anew."""
        known = key in self._taken
        if not known:
            self._taken[key] = take()
        found, work = self._taken[key]
        return found, 0 if known and not self._each else work
