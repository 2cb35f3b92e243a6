"""Where in the depth of a stack the blocks begin to write differently."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from billhook.plan.audit import Transition

LEAST_SHARE = 0.5
_EDGE = 0.2  # of the blocks stay on either side: the first and the last ones are always special
_FEWEST = 8


def transition(size: Sequence[float], alignment: Sequence[float]) -> Transition | None:
    """The best place to divide a stack in two by what its blocks write, and whether it is a transition.

    ``size`` (> 0, taken in logarithms) and ``alignment`` are one figure a block each, both brought to variance 1. The
    place is the one that leaves the least squared error about the means of the two parts (one change point by least
    squares), with at least a fifth of the blocks on either side. It counts as a transition if that step explains at
    least half of the variance, and more of it than a straight line does: a steady drift is none.

    "Do Language Models Use Their Depth Efficiently?" (arXiv 2505.13898) reads it off a picture; this rule is ours. None
    for fewer than eight blocks, and where a size is 0.
    """
    blocks = len(size)
    if blocks < _FEWEST or min(size) <= 0:
        return None
    series = np.stack([_standard(np.log(np.asarray(size))), _standard(np.asarray(alignment))])
    total = float((series**2).sum())
    if total == 0:
        return None
    edge = max(1, int(np.ceil(_EDGE * blocks)))
    errors = {at: _spread(series[:, :at]) + _spread(series[:, at:]) for at in range(edge, blocks - edge + 1)}
    best = min(errors, key=errors.__getitem__)
    line = _standard(np.arange(blocks, dtype=float))
    step, slope = 1 - errors[best] / total, float(((series @ line) ** 2).sum() / (line @ line)) / total
    return Transition(
        block=best,
        found=step >= LEAST_SHARE and step > slope,
        step=step,
        slope=slope,
        size=_means(np.asarray(size), best),
        alignment=_means(np.asarray(alignment), best),
    )


def _standard(values: np.ndarray) -> np.ndarray:
    """Mean 0 and variance 1; zeros for a constant."""
    centred = values - values.mean()
    spread = centred.std()
    return centred / spread if spread > 1e-12 else np.zeros_like(centred)


def _spread(part: np.ndarray) -> float:
    return float(((part - part.mean(1, keepdims=True)) ** 2).sum())


def _means(values: np.ndarray, at: int) -> tuple[float, float]:
    return float(values[:at].mean()), float(values[at:].mean())
