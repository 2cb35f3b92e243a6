"""How far a changed model is from the dense one on text that no fit has seen: what decides whether healing is kept."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from billhook.anatomy.types import Anatomy
from billhook.heal.refit.peers import ALONE, Peers
from billhook.heal.refit.stepping import Batches

CHUNK = 128  # positions at once: float32 logits for a vocabulary of 49k take 25 MB


def divergence(
    stepper: Batches,
    anatomy: Anatomy,
    chosen: list[Tensor],
    changes: Iterable[AbstractContextManager[Any]],
    peers: Peers = ALONE,
) -> list[float]:
    """For each change (a context in which the model is changed) the mean distance of a token from the dense model.

    Of a language model that predicts the next token, the Kullback-Leibler divergence of its distribution from the dense
    one, in nats; of any other, |stream - dense stream|^2 / |dense stream|^2 after the last block. Taken over the rows
    ``chosen`` (bool [rows] a batch) of batches that were walked through the stack, padding left out; over those of
    all ``peers``. Infinite where the stream is not finite.

    Only the stream after the last block is kept, dense and changed; final norm and head run on pieces of it, in the
    model's own forward. So a change is one of blocks. Cost: the model once, and once for each change, on batches that
    hold a chosen row; memory: two streams, and a few times 128 x vocabulary x 4 bytes.
    """
    used = [i for i, rows in enumerate(chosen) if rows.any()]
    dense = {i: stepper.last(i) for i in used}
    found = []
    for change in changes:
        with change:
            now = {i: stepper.last(i) for i in used}
        total, count = 0.0, 0.0
        for i in used:
            rows = stepper.real(i, dense[i]) & chosen[i].to(dense[i].device)[:, None]
            ids = stepper.batches[i]["input_ids"][rows] if _speaks(stepper, anatomy) else None
            total += _distance(stepper, ids, dense[i][rows], now[i][rows])
            count += int(rows.sum())
        total, count = peers.added(total, count)
        found.append(total / max(count, 1))
    return found


def _distance(stepper: Batches, ids: Tensor | None, dense: Tensor, now: Tensor) -> float:
    """The sum over positions; ``ids`` [c] where the model predicts the next token."""
    if not now.isfinite().all():
        return math.inf
    if ids is None:
        one, other = dense.float(), now.float()
        return ((other - one).square().sum(-1) / one.square().sum(-1)).sum(dtype=torch.float64).item()
    total, chunk = 0.0, min(CHUNK, stepper.batches[0]["input_ids"].shape[1])  # what the model has positions for
    for piece, *pair in zip(*(torch.split(t, chunk) for t in (ids, dense, now)), strict=True):
        log_p, log_q = (log_softmax(stepper.logits(piece, stream).float(), -1) for stream in pair)
        total += (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64).item()
    return total


def _speaks(stepper: Batches, anatomy: Anatomy) -> bool:
    inputs = stepper.batches[0]
    given = "input_ids" in inputs and "decoder_input_ids" not in inputs
    return given and stepper.stack.causal and anatomy.head is not None
