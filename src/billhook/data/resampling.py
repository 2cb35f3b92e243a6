"""Text that is like a target: importance resampling in a space of hashed n-grams."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

BUCKETS = 10_000
_SMOOTHING = 1e-8


def log_ratios(ids: Tensor, target: Tensor) -> NDArray[np.float64]:
    """For each window of ``ids`` [n, length] log p(window) - log q(window), float64 [n], in nats: how much likelier it
    is among the windows ``target`` [m, length'] than among ``ids``.

    p and q are bags of hashed n-grams: log p(window) = sum over its unigrams and bigrams g of log p[bucket(g)], with
    p[b] the share of bucket b of 10,000 among all n-grams of the target, and q likewise.

    Source: DSIR (arXiv 2302.03169), section 3: 10,000 buckets, unigrams and bigrams, both distributions smoothed by
    1e-8. There the n-grams are of words; here of tokens, so that text of any origin can be weighed. Cost: a few
    operations a token; memory 32 bytes a token.
    """
    raw, wanted = _buckets(ids), _buckets(target)
    p, q = (np.bincount(found.ravel(), minlength=BUCKETS) / found.size for found in (wanted, raw))
    found: NDArray[np.float64] = (np.log(p + _SMOOTHING) - np.log(q + _SMOOTHING))[raw].sum(axis=1)
    return found


def resampled(log_weights: NDArray[np.float64], count: int, seed: int) -> NDArray[np.int64]:
    """``count`` numbers drawn without replacement, each draw in proportion to exp(log_weights) of what is left, sorted.

    The Gumbel top-k trick: the largest of log_weights + Gumbel noise (DSIR, section 3)."""
    noise = np.random.default_rng(seed).gumbel(size=len(log_weights))
    return np.sort(np.argsort(-(log_weights + noise), kind="stable")[:count])


def _buckets(ids: Tensor) -> NDArray[np.int64]:
    """The buckets of each window's unigrams and bigrams, [n, 2 x length - 1]."""
    tokens = ids.cpu().numpy().astype(np.uint64) + np.uint64(1)
    grams = np.hstack([tokens, tokens[:, :-1] * np.uint64(0x9E3779B97F4A7C15) + tokens[:, 1:]])
    spread = (grams ^ (grams >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    found: NDArray[np.int64] = ((spread >> np.uint64(33)) % np.uint64(BUCKETS)).astype(np.int64)
    return found
