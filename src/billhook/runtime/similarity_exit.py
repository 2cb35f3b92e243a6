"""Leaving a stack once its blocks change the stream no more."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy, Block
from billhook.runtime.attached import Attached
from billhook.runtime.counts import Counts
from billhook.runtime.online import Online, Pass, Skip
from billhook.runtime.policy import Policy


class SimilarityExit(Policy):
    """Once cos(stream before, stream after) of a block is above the threshold of its stack, no further block of the
    stack runs. Encoder and decoder leave independently, each at a depth of its own.

    In a ``decoder`` every token leaves for itself. In an ``encoder`` every row does, by the mean cosine of its real
    tokens, since its tokens read each other. At least ``first`` blocks always run. A threshold of 1 never leaves.

    Source: MuE, "You Need Multiple Exiting", Tang et al. 2023 (arXiv 2211.11152), section 3: saturation between
    consecutive layers, decided separately in encoder and decoder. The paper also separates image and text tokens of one
    encoder and tunes the model with a loss at every layer; models with two modalities in one encoder are not among
    those supported here, and nothing is tuned.

    Keys and values: projected. The blocks not run make the keys and values of a token from the stream as it left, so
    every position has an entry everywhere; in an encoder there is no cache. State: within a pass, who has left.
    """

    name: ClassVar[str] = "similarity-exit"
    paper: ClassVar[str] = "Tang et al. 2023, arXiv 2211.11152"
    kv: ClassVar[str] = "projected from the stream"
    dial: ClassVar[tuple[str, float, float]] = ("decoder", 1.0, -1.0)

    decoder: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.99
    encoder: Annotated[float, Field(ge=-1.0, le=1.0)] = 1.0
    first: Annotated[int, Field(ge=1)] = 2

    def _attach(self, model: PreTrainedModel, anatomy: Anatomy) -> Attached:
        counts = Counts()
        stacks = [stack.name for stack in anatomy.stacks if stack.name in ("encoder", "decoder")]
        return Attached(model, self, counts, Online(model, anatomy, _Exit(self), stacks, counts).fit)


class _Exit:
    def __init__(self, policy: SimilarityExit) -> None:
        self._policy = policy
        self._left: Tensor | None = None

    def begin(self, now: Pass) -> None:
        self._left = None

    def decide(self, block: Block, stream: Tensor, now: Pass) -> Skip | None:
        if self._left is None:
            return None
        return Skip(frozenset(sub.kind for sub in block.sublayers), self._left)

    def saw(self, block: Block, before: Tensor, after: Tensor, now: Pass) -> None:
        threshold = self._policy.encoder if now.stack == "encoder" else self._policy.decoder
        if threshold >= 1 or block.address.block + 1 < self._policy.first:
            return
        cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        if now.stack == "encoder":
            real = torch.ones_like(cosine) if now.real is None else now.real.to(cosine)
            cosine = ((cosine * real).sum(-1, keepdim=True) / real.sum(-1, keepdim=True)).expand_as(cosine)
        leaves = cosine > threshold
        self._left = leaves if self._left is None else self._left | leaves

    def saw_mlp(self, block: Block, before: Tensor, after: Tensor, now: Pass) -> None:
        pass
