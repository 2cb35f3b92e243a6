"""How many tokens to draft before the full model looks at them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Confidence:
    """Draft on while the draft's highest probability is at least ``threshold``, at most ``longest`` tokens.

    The token at which confidence runs out is still verified: it has been paid for, and a rule that left it out after
    seeing it would bend the distribution of sampled text. After each round the threshold moves by ``step`` so that the
    smoothed acceptance rate goes to ``target`` (Zhang et al. 2023, Draft & Verify, section 3.3; without the second
    smoothing there, under which a threshold takes a thousand rounds to get anywhere).
    """

    longest: int = 8
    threshold: float = 0.6
    target: float = 0.8
    step: float = 0.02
    _rate: float = 0.8

    def enough(self, drafted: int, confidence: float) -> bool:
        return drafted >= self.longest or confidence < self.threshold

    def update(self, drafted: int, accepted: int) -> None:
        self._rate = 0.5 * self._rate + 0.5 * accepted / drafted
        moved = self.threshold + (self.step if self._rate < self.target else -self.step)
        self.threshold = min(max(moved, 0.0), 0.98)
