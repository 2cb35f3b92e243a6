"""Figures with their spread."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student

from billhook.plan.record import Interval

CONFIDENCE = 0.95


def mean_interval(values: ArrayLike, *, low: float = -math.inf, high: float = math.inf) -> Interval:
    """Mean of independent samples [n >= 2] and its two-sided 95% Student t interval, cut to [low, high].

    A t interval and not a bootstrap of the mean: with the 10 to 20 windows that are usual here a percentile bootstrap
    is too narrow (it lacks both the factor sqrt(n / (n - 1)) and the heavier tails), and needs a seed besides.
    """
    samples = np.asarray(values, dtype=np.float64)
    mean = float(samples.mean())
    half = float(student.ppf((1 + CONFIDENCE) / 2, len(samples) - 1) * samples.std(ddof=1) / math.sqrt(len(samples)))
    return Interval(
        value=min(max(mean, low), high), low=min(max(mean - half, low), high), high=min(max(mean + half, low), high)
    )


def exponential(interval: Interval) -> Interval:
    """The same interval of the exponential: of a perplexity from a mean log-loss, of a ratio from a difference."""
    return Interval(value=math.exp(interval.value), low=math.exp(interval.low), high=math.exp(interval.high))


def quartiles(values: Sequence[float]) -> Interval:
    """Median, first and third quartile of repeated timings."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return Interval(value=float(middle), low=float(low), high=float(high))
