"""Blocks that hardly change the norm of the stream, left out separately while reading and while writing."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy, Block
from billhook.anatomy.undo import Undo
from billhook.data import Windows
from billhook.plan.errors import InputError
from billhook.runtime.attached import Attached
from billhook.runtime.counts import Counts
from billhook.runtime.online import Online, Pass, Skip
from billhook.runtime.policy import Policy

Usage = tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...]

GENERATED = 32


class Voids(Policy):
    """Leaves out the blocks of the decoder that are used by a share of tokens below ``threshold``, by one map for what
    is read at once (``prompt``) and another for tokens generated one by one (``generation``). A threshold of 0 leaves
    nothing out. The first and the last block always run.

    A token uses a block if it changes the norm of the token's stream by more than ``alpha`` times the mean change over
    all blocks: | ||y|| - ||x|| | > alpha * mean over blocks; a block that it does not use is a void for that token.
    ``fitted`` traces both maps, on prompts from the text and on what the model then writes itself.

    Source: "Void in Language Models", Shemiranifar 2025 (arXiv 2505.14467): voids by the change of the L2 norm, no
    parameters trained, prompt and generated tokens traced separately. Chosen here: the threshold for a void, and that
    maps over a text decide: whether a block is a void for a token is known only once it has been computed, which
    saves nothing.

    Keys and values: projected. A block left out for a token makes its keys and values from the stream as it comes in,
    since tokens of the other phase may use the block. State: none beyond the maps.
    """

    name: ClassVar[str] = "voids"
    paper: ClassVar[str] = "Shemiranifar 2025, arXiv 2505.14467"
    kv: ClassVar[str] = "projected from the stream"
    dial: ClassVar[tuple[str, float, float]] = ("threshold", 0.0, 1.0)
    wants_text: ClassVar[bool] = True

    threshold: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    alpha: Annotated[float, Field(gt=0.0)] = 0.5
    prompt: Usage = ()
    generation: Usage = ()

    def fitted(self, model: PreTrainedModel, anatomy: Anatomy, windows: Windows) -> Self:
        """With both maps traced: the first half of each window is the prompt, ``GENERATED`` tokens follow greedily.
        Maps that are there already stay."""
        if self.prompt and self.generation:
            return self
        seen = _Usage(self.alpha)
        undo = Undo()
        Online(model, anatomy, seen, ["decoder"], Counts()).fit(undo)
        try:
            half = windows.ids[:, : max(1, windows.ids.shape[1] // 2)]
            for ids in half:
                ids = ids[None].to(model.device)
                mask = torch.ones_like(ids)
                model.generate(ids, attention_mask=mask, max_new_tokens=GENERATED, min_new_tokens=2, do_sample=False)
        finally:
            undo.restore()
        return self.model_copy(update={"prompt": seen.map(True), "generation": seen.map(False)})

    def _attach(self, model: PreTrainedModel, anatomy: Anatomy) -> Attached:
        count = len(anatomy.stack("decoder").blocks)
        for phase, usage in (("prompt", self.prompt), ("generation", self.generation)):
            if len(usage) not in (0, count):
                raise InputError(f"policy voids: the {phase} map has {len(usage)} blocks, the decoder has {count}")
        if self.threshold > 0 and not (self.prompt and self.generation):
            raise InputError("policy voids: a threshold above 0 needs maps traced on text first (tune-policy does)")
        counts = Counts()
        return Attached(model, self, counts, Online(model, anatomy, _Left(self), ["decoder"], counts).fit)

    def voids(self, phase: Usage) -> frozenset[int]:
        """The blocks that are left out in a phase, given its map."""
        return frozenset(i for i, used in enumerate(phase[:-1]) if i and used < self.threshold)


class _Left:
    def __init__(self, policy: Voids) -> None:
        self._gone = {True: policy.voids(policy.prompt), False: policy.voids(policy.generation)}

    def begin(self, now: Pass) -> None:
        pass

    def decide(self, block: Block, stream: Tensor, now: Pass) -> Skip | None:
        if block.address.block not in self._gone[now.prompt]:
            return None
        return Skip(frozenset(sub.kind for sub in block.sublayers))

    def saw(self, block: Block, before: Tensor, after: Tensor, now: Pass) -> None:
        pass

    def saw_mlp(self, block: Block, before: Tensor, after: Tensor, now: Pass) -> None:
        pass


class _Usage:
    """A trigger that leaves nothing out and notes how each block changes the norm of each token's stream."""

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha
        self._changes: list[Tensor] = []
        self._prompt = True
        self._used: dict[bool, Tensor] = {}
        self._tokens = {True: 0, False: 0}

    def begin(self, now: Pass) -> None:
        self._close()
        self._prompt = now.prompt

    def decide(self, block: Block, stream: Tensor, now: Pass) -> Skip | None:
        return None

    def saw(self, block: Block, before: Tensor, after: Tensor, now: Pass) -> None:
        self._changes.append((after.float().norm(dim=-1) - before.float().norm(dim=-1)).abs().flatten())

    def saw_mlp(self, block: Block, before: Tensor, after: Tensor, now: Pass) -> None:
        pass

    def map(self, prompt: bool) -> tuple[float, ...]:
        """The share of the tokens of a phase that use each block."""
        self._close()
        return tuple((self._used[prompt] / self._tokens[prompt]).tolist())

    def _close(self) -> None:
        if not self._changes:
            return
        changes = torch.stack(self._changes)  # [blocks, tokens]
        used = (changes > self._alpha * changes.mean(0)).sum(-1)
        self._used[self._prompt] = self._used.get(self._prompt, 0) + used
        self._tokens[self._prompt] += changes.shape[1]
        self._changes = []
