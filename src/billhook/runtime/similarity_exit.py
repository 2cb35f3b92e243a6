"""Leaving a stack once its blocks change the stream no more."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy, Block
from billhook.anatomy.undo import Undo
from billhook.plan.errors import InputError
from billhook.runtime.attached import Attached
from billhook.runtime.counts import Counts
from billhook.runtime.images import Images
from billhook.runtime.online import Online, Pass, Skip
from billhook.runtime.policy import Policy

Threshold = Annotated[float, Field(ge=-1.0, le=1.0)]


class SimilarityExit(Policy):
    """Once cos(stream before, stream after) of a block is above the threshold of its stack, no further block of the
    stack runs. Encoder and decoder leave independently, each at a depth of its own.

    In a ``decoder`` every token leaves for itself; where ``vision`` is given it is the threshold of the tokens of
    images, and ``decoder`` that of all others. In an ``encoder`` every row leaves, by the mean cosine of its real
    tokens, since its tokens read each other. At least ``first`` blocks always run. A threshold of 1 never leaves.

    Source: MuE, "You Need Multiple Exiting", Tang et al. 2023 (arXiv 2211.11152), section 3: saturation between
    consecutive layers, decided separately in encoder and decoder. There one encoder reads image and text, and is taken
    apart so that the tokens of each leave it at a layer of their own; and the model is tuned with a loss at every
    layer. The models supported here that read both do so in a decoder, behind a tower that sees the image alone: so
    it is in the decoder that images leave by a threshold of their own, one token at a time like all others there, and
    the tower runs whole. Nothing is tuned, and ``tune-policy`` turns ``decoder`` alone: steps as coarse as those of a
    search over two thresholds do not tell cosines near 1 apart, and its text shows no image.

    Keys and values: projected. The blocks not run make the keys and values of a token from the stream as it left, so
    every position has an entry everywhere; in an encoder there is no cache. State: within a pass, who has left, and
    where ``vision`` is given which tokens stand for images, told by ``input_ids``.
    """

    name: ClassVar[str] = "similarity-exit"
    paper: ClassVar[str] = "Tang et al. 2023, arXiv 2211.11152"
    kv: ClassVar[str] = "projected from the stream"
    dial: ClassVar[tuple[str, float, float]] = ("decoder", 1.0, -1.0)

    decoder: Threshold = 0.99
    encoder: Threshold = 1.0
    vision: Threshold | None = None
    first: Annotated[int, Field(ge=1)] = 2

    def _attach(self, model: PreTrainedModel, anatomy: Anatomy) -> Attached:
        counts, images = Counts(), Images(model)
        stacks = [stack.name for stack in anatomy.stacks if stack.name in ("encoder", "decoder")]
        if self.vision is not None and (not images or "encoder" in stacks):
            raise InputError(
                f"policy similarity-exit: no decoder of this {anatomy.family} model reads images; leave out vision"
            )
        online = Online(model, anatomy, _Exit(self, images), stacks, counts)

        def fit(undo: Undo) -> None:
            if self.vision is not None:
                images.fit(undo)
            online.fit(undo)

        return Attached(model, self, counts, fit)


class _Exit:
    def __init__(self, policy: SimilarityExit, images: Images) -> None:
        self._policy, self._images = policy, images
        self._left: Tensor | None = None

    def begin(self, now: Pass) -> None:
        self._left = None

    def decide(self, block: Block, stream: Tensor, now: Pass) -> Skip | None:
        if self._left is None:
            return None
        return Skip(frozenset(sub.kind for sub in block.sublayers), self._left)

    def saw(self, block: Block, before: Tensor, after: Tensor, now: Pass) -> None:
        threshold = self._policy.encoder if now.stack == "encoder" else self._policy.decoder
        vision = threshold if self._policy.vision is None else self._policy.vision
        if min(threshold, vision) >= 1 or block.address.block + 1 < self._policy.first:
            return
        cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        if now.stack == "encoder":
            real = torch.ones_like(cosine) if now.real is None else now.real.to(cosine)
            cosine = ((cosine * real).sum(-1, keepdim=True) / real.sum(-1, keepdim=True)).expand_as(cosine)
        cosine = cosine.clamp(max=1.0)  # rounding must not pass a threshold of 1
        if self._policy.vision is None:
            leaves = cosine > threshold
        else:
            leaves = cosine > torch.where(self._images.among(after), vision, threshold)
        self._left = leaves if self._left is None else self._left | leaves

    def saw_mlp(self, block: Block, before: Tensor, after: Tensor, now: Pass) -> None:
        pass
