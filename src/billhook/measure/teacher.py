"""What the dense model would have said, kept small, and how far a state of the replay is from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.measure.replay import Replay
from billhook.plan.errors import InputError

_SMALLEST_REST = 1e-7  # what float32 can tell of 1 - sum(p)


@dataclass(frozen=True)
class Damage:
    """Means over predicted tokens: ``kl`` from the dense model and ``loss`` (negative log-likelihood of the text), both
    in nats; ``top1`` the share where the dense model's first choice is still a first choice."""

    kl: float
    loss: float
    top1: float


@dataclass(frozen=True)
class _Piece:
    """Dense figures of c positions: the token there and the next one, int [c]; the k likeliest tokens, best first, with
    their log-probabilities and that of all others together: int [c, k] and float [c, k + 1]."""

    ids: Tensor
    targets: Tensor
    chosen: Tensor
    log_p: Tensor


class Teacher:
    """The dense next-token distributions of a decoder-only language model over the inputs of a replay.

    Kept a token: the k largest log-probabilities and the mass of all others as one bucket, 12k bytes and a few. The
    divergence over these k + 1 outcomes is never above the exact one (merging outcomes cannot raise a divergence: the
    data processing inequality) but for float32 rounding, and close to it: with k of 16, 64, 256, 1024 it was 74, 86, 94
    and 98% of the exact one on a vocabulary of 49k (one block dropped, text of 512 tokens).

    The head is evaluated on every position that has a next token: one without would cost its way through the blocks
    and tell nothing. It runs over ``chunk`` positions at once, so their float32 logits take chunk x vocabulary x 4
    bytes (25 MB for a vocabulary of 49k).
    """

    def __init__(self, replay: Replay, k: int = 256, chunk: int = 128) -> None:
        """Takes the current state of the replay for the dense model: make it before anything is committed.

        Raises InputError if the model does not predict the next token of its own inputs, or none is to be predicted.
        """
        require_next_tokens(replay)
        self._replay = replay
        self._predicting = [real[:, :-1] & real[:, 1:] for real in replay.real]
        self._chunk = min(chunk, max(real.shape[1] for real in replay.real))  # no position beyond those of the inputs
        self._pieces: list[_Piece] = []
        ids = [batch["input_ids"] for batch in replay.batches]
        here = self._split([i[:, :-1] for i in ids])
        after = self._split([i[:, 1:] for i in ids])
        streams = self._split([s[:, :-1] for s in replay.final])
        for stream, piece, targets in zip(streams, here, after, strict=True):
            logits = replay.logits(piece, stream).float()
            chosen = logits.topk(min(k, logits.shape[-1] - 1)).indices
            log_p, _ = _log_probabilities(logits, chosen, targets)
            self._pieces.append(_Piece(piece, targets, chosen, log_p))
        self.tokens = sum(len(piece.ids) for piece in self._pieces)
        if self.tokens == 0:
            raise InputError("no token of the calibration has a next one: at least 2 tokens a row are needed")

    def damage(self, streams: list[Tensor]) -> Damage:
        """How far the model is from dense if its stream after the last block is this: [rows, tokens, hidden] a batch.

        Costs one pass of the final norm and head. All infinite where the logits are not finite.
        """
        sums = torch.zeros(3, dtype=torch.float64)
        for piece, stream in zip(self._pieces, self._split([s[:, :-1] for s in streams]), strict=True):
            logits = self._replay.logits(piece.ids, stream).float()
            agrees = logits.gather(1, piece.chosen[:, :1])[:, 0] == logits.amax(-1)
            log_q, loss = _log_probabilities(logits, piece.chosen, piece.targets)
            kl = (piece.log_p.exp() * (piece.log_p - log_q)).sum(-1)
            sums += torch.stack([part.double().sum() for part in (kl, loss, agrees)]).cpu()
        if not sums.isfinite().all():
            return Damage(float("inf"), float("inf"), 0.0)
        kl, loss, top1 = (sums / self.tokens).tolist()
        return Damage(kl, loss, top1)

    def _split(self, tensors: list[Tensor]) -> Iterator[Tensor]:
        """Pieces of at most ``chunk`` predicting positions, of tensors [rows, tokens - 1, ...], one a batch."""
        for tensor, predicting in zip(tensors, self._predicting, strict=True):
            rows = tensor[predicting]
            yield from (rows[i : i + self._chunk] for i in range(0, len(rows), self._chunk))


def predicts_next_tokens(replay: Replay) -> bool:
    """Whether the model predicts the next token of its own inputs."""
    batch = replay.batches[0]
    return replay.anatomy.head is not None and replay.stack.causal and "decoder_input_ids" not in batch


def require_next_tokens(replay: Replay) -> None:
    """InputError if the model does not predict the next token of its own inputs."""
    if not predicts_next_tokens(replay):
        family = replay.anatomy.family
        raise InputError(
            f"what a model predicts needs a decoder-only language model, which this {family} model is not; "
            f"the error of the stream can be measured instead"
        )


def _log_probabilities(logits: Tensor, chosen: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the chosen tokens and of all others together, float [c, k + 1], and the loss float [c].

    Overwrites the logits. (torch.logsumexp in float32 takes ten times as long as these passes on a CPU.)
    """
    few = logits.gather(1, torch.cat([chosen, targets[:, None]], 1))
    largest = logits.amax(-1, keepdim=True)
    few -= largest + logits.sub_(largest).exp_().sum(-1, keepdim=True).log()
    rest = (1 - few[:, :-1].exp().sum(-1, keepdim=True)).clamp(min=_SMALLEST_REST).log()
    return torch.cat([few[:, :-1], rest], 1), -few[:, -1]
