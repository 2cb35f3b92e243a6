"""Text for what the cut harmed: more of the kinds that suffered more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

CONCEPTS = 5  # of a window


@dataclass(frozen=True)
class Choice:
    """The numbers of the windows that were ``chosen``, in order, and how many were ``screened`` out as conflicting."""

    chosen: list[int]
    screened: int


def paser(
    groups: NDArray[np.int64],
    harm: NDArray[np.float64],
    concepts: Sequence[frozenset[int]],
    count: int,
) -> Choice:
    """Up to ``count`` windows, given each one's group, ``harm`` (how far the cut model is from the dense one in it, in
    nats a token) and concepts.

    Each group has a share of ``count`` in proportion to its mean harm, in a group the most harmed windows come first,
    and one that conflicts with what was chosen before is passed over: it brings two concepts together that both
    occurred, but never in one window. What a group cannot fill goes to the others, so fewer than ``count`` windows come
    back only if all others conflict.

    Source: PASER (arXiv 2502.12594), section 3.3 (budgets by capability degradation), 3.3 (the most harmed per unit of
    cost; all windows cost the same here) and 3.4 (concept consistency graph). Divergence from the dense model is the
    Kullback-Leibler one here, as everywhere in Billhook, not Jensen-Shannon.
    """
    waiting = {int(g): sorted(np.flatnonzero(groups == g), key=lambda i: (-harm[i], i)) for g in np.unique(groups)}
    means = {g: max(float(harm[groups == g].mean()), 0.0) for g in waiting}
    graph = _Consistency()
    chosen: list[int] = []
    screened = 0
    while len(chosen) < count and any(waiting.values()):
        open_ = {g: means[g] for g, left in waiting.items() if left}
        for g, share in _shares(open_, count - len(chosen)).items():
            left = waiting[g]
            while share and left:
                number = int(left.pop(0))
                if graph.takes(concepts[number]):
                    chosen.append(number)
                    share -= 1
                else:
                    screened += 1
    return Choice(sorted(chosen), screened)


def concepts_of(ids: NDArray[np.int64]) -> list[frozenset[int]]:
    """The five tokens of each window [n, length] that mark it most, by tf-idf: how often it occurs there times
    log(n / windows with it). Tokens that occur once in a window, or in no other window, mark nothing.

    PASER extracts key phrases with RAKE; this needs no list of stop words and works in any language.
    """
    counts = [Counter(row.tolist()) for row in ids]
    spread = Counter(token for count in counts for token in count)

    def marks(count: Counter[int]) -> frozenset[int]:
        worth = {t: -times * np.log(len(ids) / spread[t]) for t, times in count.items() if times > 1 and spread[t] > 1}
        return frozenset(sorted((t for t in worth if worth[t] < 0), key=lambda t: (worth[t], t))[:CONCEPTS])

    return [marks(count) for count in counts]


class _Consistency:
    """Concepts seen so far, joined where one window had both."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._joined: set[tuple[int, int]] = set()

    def takes(self, concepts: frozenset[int]) -> bool:
        """Whether no two known concepts come together for the first time; if so, these are known from now on."""
        pairs = set(combinations(sorted(concepts), 2))
        if any(a in self._seen and b in self._seen for a, b in pairs - self._joined):
            return False
        self._seen |= concepts
        self._joined |= pairs
        return True


def _shares(means: dict[int, float], count: int) -> dict[int, int]:
    """Whole numbers of sum ``count``, in proportion to the means (equal where all are 0), by largest remainder."""
    total = sum(means.values())
    exact = {g: count * (mean / total if total > 0 else 1 / len(means)) for g, mean in means.items()}
    shares = {g: int(value) for g, value in exact.items()}
    lacking = count - sum(shares.values())
    for g in sorted(exact, key=lambda g: (shares[g] - exact[g], g))[:lacking]:
        shares[g] += 1
    return shares
