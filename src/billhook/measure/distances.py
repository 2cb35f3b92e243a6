"""How far the logits of a model are from those of the dense one: a vector, a direction or a distribution.

Source: FinerCut (arXiv 2405.18218), which removes the sublayer whose absence moves the model's output least, by one of
these three. Each takes two pieces of logits, float32 [c, vocabulary], and gives one figure a position, float32 [c].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize

from billhook.measure.replay import Replay
from billhook.measure.teacher import require_next_tokens

Distance = Literal["angle", "euclidean", "jensen-shannon"]


def angle(dense: Tensor, now: Tensor) -> Tensor:
    """The angle between two rows of logits, as a fraction of a half turn: 0 to 1.

    From the sum and the difference of the unit vectors (Kahan), since arccos loses small angles: in float32 it cannot
    tell one below 1e-4 from none. The authors' code cuts angles off at a quarter turn; here they go on.
    """
    one, other = normalize(dense, dim=-1), normalize(now, dim=-1)
    return torch.atan2((one - other).norm(dim=-1), (one + other).norm(dim=-1)) / (math.pi / 2)


def euclidean(dense: Tensor, now: Tensor) -> Tensor:
    """||dense - now||, in the units of the logits. The authors' code takes one norm over all positions of a text."""
    return (dense - now).square().sum(-1).sqrt()


def jensen_shannon(dense: Tensor, now: Tensor) -> Tensor:
    """Half the divergences of both next-token distributions from their mean: 0 to ln 2, in nats.

    The definition (Lin 1991); the authors' code takes the divergences of the mean from both instead.
    """
    log_p, log_q = log_softmax(dense, dim=-1), log_softmax(now, dim=-1)
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2)
    both = log_p.exp() * (log_p - log_mean) + log_q.exp() * (log_q - log_mean)
    return both.sum(-1) / 2


DISTANCES: dict[Distance, Callable[[Tensor, Tensor], Tensor]] = {
    "angle": angle,
    "euclidean": euclidean,
    "jensen-shannon": jensen_shannon,
}


class OutputDistance:
    """The mean distance of a state's logits from the dense ones, over all positions of a replay that are no padding.

    Dense logits of a vocabulary of 49k take 200 kB a token, so they are not kept: the dense stream after the last block
    is, and the head runs on both streams, ``chunk`` positions at once. An evaluation costs two passes of final norm
    and head; memory is the dense stream, and a few times chunk x vocabulary x 4 bytes (25 MB for a vocabulary of 49k).
    """

    def __init__(self, replay: Replay, kind: Distance, chunk: int = 128) -> None:
        """Takes the current state of the replay for the dense model. InputError where it predicts no next token."""
        require_next_tokens(replay)
        self._replay, self._distance = replay, DISTANCES[kind]
        self._chunk = min(chunk, max(real.shape[1] for real in replay.real))  # no position beyond those of the inputs
        self._ids = list(self._split([batch["input_ids"] for batch in replay.batches]))
        self._dense = list(self._split(replay.final))

    def __call__(self, streams: list[Tensor]) -> float:
        """The distance if the stream after the last block is this: [rows, tokens, hidden] a batch. Infinite where the
        logits are not finite."""
        total, count = torch.zeros((), dtype=torch.float64), 0
        for ids, dense, stream in zip(self._ids, self._dense, self._split(streams), strict=True):
            pair = (self._replay.logits(ids, piece).float() for piece in (dense, stream))
            total += self._distance(*pair).double().sum().cpu()
            count += len(ids)
        return total.item() / count if total.isfinite() else math.inf

    def _split(self, tensors: list[Tensor]) -> Iterator[Tensor]:
        """Pieces of at most ``chunk`` positions that are no padding, of tensors [rows, tokens, ...], one a batch."""
        for tensor, real in zip(tensors, self._replay.real, strict=True):
            rows = tensor[real]
            yield from (rows[i : i + self._chunk] for i in range(0, len(rows), self._chunk))
