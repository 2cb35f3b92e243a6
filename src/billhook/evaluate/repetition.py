"""How much a text repeats itself."""

from __future__ import annotations

from collections.abc import Sequence

N = 4


def repeated(tokens: Sequence[int]) -> float:
    """The share of 4-grams of tokens that came before in the same text: 1 - different 4-grams / all 4-grams.

    0 for a text of fewer than 4 tokens. Source: the metric seq-rep-4 of Welleck et al., "Neural Text Generation
    with Unlikelihood Training" (2020).
    """
    grams = [tuple(tokens[i : i + N]) for i in range(len(tokens) - N + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
