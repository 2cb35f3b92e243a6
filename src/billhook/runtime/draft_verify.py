"""Which drafted tokens the full model accepts, and what it says after them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def greedy(drafted: list[int], scores: Tensor) -> list[int]:
    """The drafted tokens up to the first that is not the full model's own choice, then that choice.

    ``scores`` (len(drafted) + 1, vocabulary): what the full model gives after the prefix, after the prefix and the
    first drafted token, and so on. The result is 1 to len(drafted) + 1 tokens long, and exactly what greedy decoding
    one token at a time gives for these scores.
    """
    choices: list[int] = scores.argmax(-1).tolist()
    accepted = next((i for i, token in enumerate(drafted) if token != choices[i]), len(drafted))
    return choices[: accepted + 1]


def sampled(drafted: list[int], drafts: Sequence[Tensor], probabilities: Tensor) -> list[int]:
    """Speculative sampling (Leviathan, Kalman, Matias 2023, algorithm 1): the tokens are distributed as if each were
    drawn from the full model alone.

    ``drafts`` q (n rows of the vocabulary): what each drafted token was drawn from; ``probabilities`` p (n + 1 rows):
    those of the full model. Token x is accepted with probability min(1, p(x) / q(x)); at the first rejection the next
    token is drawn from max(p - q, 0), normalised; after none, from the last p.

    Where p and q are equal but for rounding, p - q can vanish everywhere; the draw is from p then, which is the limit.
    """
    for i, token in enumerate(drafted):
        p, q = probabilities[i], drafts[i]
        if torch.rand((), device=p.device) * q[token] < p[token]:
            continue
        rest = (p - q).clamp(min=0)
        return [*drafted[:i], _draw(rest if rest.sum() > 0 else p)]
    return [*drafted, _draw(probabilities[len(drafted)])]


def _draw(weights: Tensor) -> int:
    return int(torch.multinomial(weights, 1))
