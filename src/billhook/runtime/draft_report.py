"""What a speculated generation cost and gave, measured while it ran."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from billhook.plan.address import Address
from billhook.plan.policy_record import Drafting

WINDOW = 8
"""Rounds between two looks at the clock."""


@dataclass
class Report:
    """One ``generate``. Seconds are wall clock, the prefill counts nowhere.

    A *round* drafts, verifies once and gives 1 to drafted + 1 tokens; ``plain`` tokens came from steps of one token
    each, which are taken now and then to know what speculation has to beat, and always after it has ``stopped`` itself
    (the number of tokens generated until then).
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    search_seconds: float = 0.0
    plain_tokens: int = 0
    plain_seconds: float = 0.0
    stopped: int | None = None
    skips: tuple[Address, ...] = ()
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=9), repr=False)
    _window: list[tuple[int, float]] = field(default_factory=list, repr=False)
    _slower: int = field(default=0, repr=False)

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that were accepted; those drafted behind a rejected one count as rejected."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_verify(self) -> float | None:
        return self.tokens / self.rounds if self.rounds else None

    @property
    def speedup(self) -> float | None:
        """Tokens a second of the rounds, the search for skips included, over those of the plain steps of this run."""
        spent = self.draft_seconds + self.verify_seconds + self.search_seconds
        if not (self.rounds and self.plain_tokens):
            return None
        return (self.tokens / spent) * (self.plain_seconds / self.plain_tokens)

    def plain(self, seconds: float) -> None:
        self.plain_tokens += 1
        self.plain_seconds += seconds
        self._recent.append(seconds)

    def round(self, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        self.tokens += accepted + 1
        self.draft_seconds += draft_seconds
        self.verify_seconds += verify_seconds
        self._window.append((accepted + 1, draft_seconds + verify_seconds))

    @property
    def wants_plain(self) -> bool:
        """Whether the next step should be a plain one: three at the start, then one after each window."""
        return len(self._recent) < 3 or len(self._window) >= WINDOW

    def slower(self) -> bool:
        """Asked after each plain step: has speculation been slower than such steps in two windows running?"""
        if len(self._window) < WINDOW:
            return False
        tokens, seconds = (sum(column) for column in zip(*self._window, strict=True))
        self._window.clear()
        self._slower = self._slower + 1 if seconds / tokens > median(self._recent) else 0
        return self._slower >= 2


def drafting(reports: Sequence[Report], same_text: float | None = None) -> Drafting:
    """Several generations as one record."""
    rounds, drafted, accepted, tokens = (
        sum(getattr(report, name) for report in reports) for name in ("rounds", "drafted", "accepted", "tokens")
    )
    return Drafting(
        drafted=drafted,
        accepted=accepted,
        acceptance=accepted / drafted if drafted else None,
        tokens_per_verify=tokens / rounds if rounds else None,
        same_text=same_text,
    )
