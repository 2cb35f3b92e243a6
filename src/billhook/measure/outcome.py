"""How much the output of a model changes, position by position, when its stream is changed on the way."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from billhook.measure.replay import Replay
from billhook.measure.teacher import predicts_next_tokens

_CHUNK = 128
_SMALLEST = 1e-12


class Outcome:
    """The change of the output at no more than ``most`` evenly spaced positions of a replay that are no padding.

    ``kl`` for a decoder-only language model: the divergence of its next-token distribution from the dense one, exact
    over the vocabulary, in nats. ``stream`` for all others: |y - dense|^2 / |dense|^2 of the stream behind the last
    block. Memory: most x vocabulary x 4 bytes (100 MB for a vocabulary of 49k), whatever the number of tokens.
    """

    def __init__(self, replay: Replay, most: int = 512) -> None:
        """Takes the current state of the replay for the dense model."""
        self.kind: Literal["kl", "stream"] = "kl" if predicts_next_tokens(replay) else "stream"
        self._replay = replay
        self._chosen = _spread(replay.real, most)
        self._ids = self.pick([b["input_ids"] for b in replay.batches]) if self.kind == "kl" else None
        dense = self.pick(replay.final)
        self._dense = dense.float() if self._ids is None else self._log_probabilities(dense)

    def pick(self, values: list[Tensor]) -> Tensor:
        """Of tensors [rows, tokens, ...], one a batch, the rows that belong to the positions looked at."""
        return torch.cat([value[chosen] for value, chosen in zip(values, self._chosen, strict=True)])

    def __call__(self, streams: list[Tensor]) -> Tensor:
        """The change at each position, float64, if this is the stream behind the last block: one tensor a batch."""
        now = self.pick(streams)
        if self._ids is None:
            error = (now.float() - self._dense).square().sum(-1)
            return (error / self._dense.square().sum(-1).clamp(min=_SMALLEST)).double()
        dense = self._dense
        return (dense.exp() * (dense - self._log_probabilities(now))).sum(-1).clamp(min=0).double()

    def _log_probabilities(self, stream: Tensor) -> Tensor:
        assert self._ids is not None
        pieces = zip(torch.split(self._ids, _CHUNK), torch.split(stream, _CHUNK), strict=True)
        return torch.cat([self._replay.logits(ids, piece).float().log_softmax(-1) for ids, piece in pieces])


def _spread(real: list[Tensor], most: int) -> list[Tensor]:
    """Masks with ``most`` of the real positions, evenly spread over all batches; all where there are fewer."""
    flat = torch.cat([mask.flatten() for mask in real])
    places = flat.nonzero()[:, 0]
    if len(places) > most:
        places = places[torch.arange(most, device=places.device) * len(places) // most]
    chosen = torch.zeros_like(flat)
    chosen[places] = True
    pieces = torch.split(chosen, [mask.numel() for mask in real])
    return [piece.view_as(mask) for piece, mask in zip(pieces, real, strict=True)]
