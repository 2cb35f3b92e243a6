"""Which windows a training reads, and in which order: it follows from the seed alone."""

from __future__ import annotations

import random

import torch
from torch import Tensor


def lap(count: int, weights: Tensor | None, seed: int, number: int) -> list[int]:
    """The windows of one lap over the text, in random order: every one of ``count`` once, or with ``weights`` (float64
    [count], of sum one) so often as they say.

    A weighted lap has as many places as there are windows with a weight, m. Systematic sampling hands them out: window
    i gets m x weights[i] of them, rounded down or up at random with that mean, so equal weights give each once. ``lap``
    number n is the same whenever it is asked for, so an interrupted training goes on exactly.
    """
    chance = random.Random(f"{seed}.{number}")
    order = list(range(count))
    if weights is not None:
        places = lap_length(count, weights)
        marks = (torch.arange(places, dtype=torch.float64) + 0.001 + 0.998 * chance.random()) / places
        order = torch.searchsorted(weights.cpu().double().cumsum(0), marks).tolist()
    chance.shuffle(order)
    return order


def lap_length(count: int, weights: Tensor | None) -> int:
    return count if weights is None else int((weights > 0).sum())
