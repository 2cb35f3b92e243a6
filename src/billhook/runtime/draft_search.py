"""Which sublayers a draft should skip, found out while the text is written (Xia et al. 2024, SWIFT, section 4)."""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.stats import norm

from billhook.anatomy import Anatomy
from billhook.plan.address import Address
from billhook.plan.check import units, unsound
from billhook.plan.errors import InputError
from billhook.runtime.draft import STACK

Bits = NDArray[np.bool_]
POOL = 128
"""Candidates among which the most promising is looked for."""


class SkipSearch:
    """Random and Bayesian search over sets of ``share`` of the sublayers, those of the first and last block excepted.

    The objective is *matchness*: the share of the last ``window`` verified tokens that the draft would have drafted,
    judged in one parallel pass on top of the verified cache. Candidates are random sets, exchanges of one unit of the
    best, and in every third place what maximises the expected improvement under a Gaussian process. There a candidate
    of 25 is chosen like that, by a library, and the others are random sets. Chosen here: the exchanges, every third,
    since ``trials`` are few, and the process: the kernel between two sets is exp(-d / n), d the units in which they
    differ and n their size, the prior variance that of the scores so far, the noise that of a share of ``window``
    tokens.

    ``done`` when the best matches ``target`` of a window, or after ``trials`` candidates. The same seed and scores
    propose the same sets.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        share: float = 0.45,
        *,
        window: int = 32,
        target: float = 0.95,
        trials: int = 64,
        seed: int = 0,
    ) -> None:
        last = len(anatomy.stack(STACK).blocks) - 1
        allowed = units(anatomy.outline, "sublayer")
        self.units = [a for a in allowed if a.stack == STACK and 0 < a.block < last]
        self.size = round(share * len(self.units))
        if not 0 < self.size < len(self.units):
            raise InputError(f"a share of {share} skips {self.size} of the {len(self.units)} sublayers that may go")
        self.window, self.target, self.trials = window, target, trials
        self._outline, self._random = anatomy.outline, random.Random(seed)
        spread = np.linspace(0, len(self.units) - 1, self.size).round().astype(int)
        self._best: Bits = np.isin(np.arange(len(self.units)), spread)
        self._proposed = self._best
        self.matchness = 0.0
        self._tried: list[Bits] = []
        self._scores: list[float] = []

    @property
    def best(self) -> frozenset[Address]:
        """The best set so far; evenly spaced before there is one."""
        return self._addresses(self._best)

    @property
    def done(self) -> bool:
        return self.matchness >= self.target or len(self._tried) >= self.trials

    def propose(self) -> frozenset[Address]:
        """The next candidate; ``observe`` says how it fared."""
        if not self._tried:
            chosen = self._best
        elif len(self._tried) % 3:
            chosen = self._drawn()
        else:
            pool = np.stack([self._drawn() for _ in range(POOL)])
            chosen = pool[int(np.argmax(self._expected_improvement(pool)))]
        self._proposed = chosen
        return self._addresses(chosen)

    def observe(self, score: float, best: float) -> None:
        """The matchness of what was proposed last, and that of the best set so far on the same window."""
        self._tried.append(self._proposed)
        self._scores.append(score)
        self.matchness = max(score, best)
        if score > best:
            self._best = self._proposed

    def _drawn(self) -> Bits:
        """A random set or, as often, the best one with a unit exchanged; never one that no model survives."""
        while True:
            bits = self._best.copy()
            if self._random.random() < 0.5:
                bits[:] = False
                bits[self._random.sample(range(len(bits)), self.size)] = True
            else:
                bits[self._random.choice(np.flatnonzero(bits).tolist())] = False
                bits[self._random.choice(np.flatnonzero(~bits & ~self._best).tolist())] = True
            if unsound(self._addresses(bits), self._outline) is None:
                return bits

    def _expected_improvement(self, pool: Bits) -> NDArray[np.float64]:
        """E[max(f - best, 0)] of each candidate, f the process given the scores so far."""
        scores = np.array(self._scores)
        mean, variance = scores.mean(), scores.var() + 1e-6
        seen = np.stack(self._tried)
        noise = max(mean * (1 - mean), 1e-3) / self.window
        factor = cho_factor(variance * self._kernel(seen, seen) + noise * np.eye(len(seen)))
        across = variance * self._kernel(pool, seen)
        expected = mean + across @ cho_solve(factor, scores - mean)
        spread = variance - np.einsum("ij,ji->i", across, cho_solve(factor, across.T))
        deviation = np.sqrt(np.maximum(spread, 1e-12))
        gain = expected - self.matchness
        improvement: NDArray[np.float64] = gain * norm.cdf(gain / deviation) + deviation * norm.pdf(gain / deviation)
        return improvement

    def _kernel(self, a: Bits, b: Bits) -> NDArray[np.float64]:
        differing = (a[:, None] != b[None]).sum(-1)
        kernel: NDArray[np.float64] = np.exp(-differing / self.size)
        return kernel

    def _addresses(self, bits: Bits) -> frozenset[Address]:
        return frozenset(unit for unit, skipped in zip(self.units, bits, strict=True) if skipped)
