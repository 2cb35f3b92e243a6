"""Which blocks to train: some at random, others the next time."""

from __future__ import annotations

import random


def lisa(blocks: int, count: int, period: int, seed: int) -> list[int]:
    """``count`` of the blocks, drawn anew for each period; the same for the same seed.

    Source: LISA (arXiv 2403.17919), algorithm 1. Embeddings and head, which it trains all along, stay as they are here:
    they are shared with the dense model.
    """
    return sorted(random.Random(f"{seed}.{period}").sample(range(blocks), min(count, blocks)))
