"""The loop that asks a policy, block by block and token by token, what to leave out."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from billhook.anatomy import Anatomy, Block, Stack
from billhook.anatomy.undo import Undo
from billhook.plan.address import Address
from billhook.runtime.counts import Counts
from billhook.runtime.silence import Forward, Gate, Masked, place, stream_in, stream_out, with_stream
from billhook.runtime.sparing import Sparing
from billhook.runtime.watched import Watched


@dataclass(frozen=True)
class Pass:
    """One forward of one stack.

    ``past``: tokens in the cache before it. ``tokens``: those it reads. ``prompt``: several are read at once, or the
    cache was empty; without a cache every pass is one. ``real``: no padding, bool [batch, tokens], None where nothing
    is known to be padding.
    """

    stack: str
    past: int
    tokens: int
    rows: int
    real: Tensor | None
    cache: Cache | None = None

    @property
    def prompt(self) -> bool:
        return self.past == 0 or self.tokens > 1


@dataclass(frozen=True)
class Skip:
    """What a block leaves out in a pass.

    ``kinds``: the sublayers. All of them means that the block hands the stream on as it is, norms on it included, or
    ``instead`` of it. ``where``: for which tokens, bool [batch, tokens], None for all. ``entries``: an attention left
    out for all of them still makes their keys and values; without, the trigger answers for nobody asking for them.
    """

    kinds: frozenset[str]
    where: Tensor | None = None
    instead: Tensor | None = None
    entries: bool = True


class Trigger(Protocol):
    """What a policy decides while the model runs. Called once a pass for each block of its stacks, in order."""

    def begin(self, now: Pass) -> None:
        """A pass over a stack begins."""

    def decide(self, block: Block, stream: Tensor, now: Pass) -> Skip | None:
        """Before a block: what to leave out, given the stream [batch, tokens, hidden] that comes into it."""

    def saw(self, block: Block, before: Tensor, after: Tensor, now: Pass) -> None:
        """After a block: the stream that came in and the one that it handed on."""

    def saw_mlp(self, block: Block, before: Tensor, after: Tensor, now: Pass) -> None:
        """After an MLP that ran, where the policy watches them: the stream without and with what it wrote."""


class Online:
    """A trigger at work on the stacks of a model.

    Keys and values: where an attention with a cache is left out, its keys and values are still made, from the stream as
    it stands there (the rule "projected from the stream"), so every position has an entry in every layer's cache and
    later tokens may attend to it whatever was decided; unless a trigger answers for it that none will (``entries``). A
    cross-attention left out makes none: it reads the encoder's, all of them at once, the first time it runs.

    What every real token of a pass leaves out is not computed. Where tokens disagree, a block left out is computed for
    the others (see ``Sparing``), and a sublayer for all, a part of it thrown away. So a row's result does not depend
    on its neighbours, but for rounding, and the counts say what was saved.

    ``watched`` names the blocks whose MLPs the trigger sees. Those alone, and the first block of a stack, where a pass
    begins, are then asked about: what stands between a small model and its next block costs time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        trigger: Trigger,
        stacks: Iterable[str],
        counts: Counts,
        *,
        watched: Container[int] | None = None,
    ) -> None:
        wanted = set(stacks)
        self.model, self.anatomy, self.trigger, self.counts = model, anatomy, trigger, counts
        self.stacks = [stack for stack in anatomy.stacks if stack.name in wanted]
        self._watched = watched
        self._coming: tuple[str, int, Any] = ("", 0, None)
        self._now: Pass | None = None

    def fit(self, undo: Undo) -> None:
        """Put the loop on the model; ``undo`` takes it off."""
        for stack in self.stacks:
            owner = self.model.get_submodule(stack.path.rpartition(".")[0])
            asked = [b for b in stack.blocks if self._watched is None or not b.address.block or self._sees(b)]
            place(owner, self._pass_of(stack, owner.forward, [b for b in stack.blocks if b not in asked]), undo)
            for block in asked:
                mlp = Watched(self.model, block, undo) if self._sees(block) else None
                module = self.model.get_submodule(block.path)
                place(module, self._block(module.forward, block, mlp), undo)

    def _sees(self, block: Block) -> bool:
        """Whether the trigger sees the MLP of this block."""
        return self._watched is not None and block.address.block in self._watched

    def _gates(self, block: Block, *, entries: bool) -> list[Gate]:
        """Of every sublayer; an attention with a cache keeps its keys and values, if it is to make ``entries``."""
        sizes = self.anatomy.outline.stack(block.address.stack).blocks[block.address.block].sublayers
        return [
            Gate(self.model, sub, keep_kv=entries and sub.kind == "attention" and sizes[sub.kind].cache_width > 0)
            for sub in block.sublayers
        ]

    def _pass_of(self, stack: Stack, original: Forward, unasked: list[Block]) -> Forward:
        always = [sub.address for block in unasked for sub in block.sublayers]

        def forward(*args: Any, **kwargs: Any) -> Any:
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            past = int(cache.get_seq_length()) if cache is not None and stack.causal else 0
            self._coming = (stack.name, past, kwargs.get("attention_mask"))
            self._now = None
            try:
                output = original(*args, **kwargs)
                self._count_all(always)
                return output
            finally:
                self._now = None

        return forward

    def _begin(self, stream: Tensor, cache: Cache | None) -> Pass:
        """The pass whose first block gets this stream: only there it is certain how many tokens are read."""
        name, past, mask = self._coming
        rows, tokens = stream.shape[:2]
        now = self._now = Pass(name, past, tokens, rows, _real(mask, past, rows, tokens), cache)
        self.trigger.begin(now)
        return now

    def _block(self, original: Forward, block: Block, watched: Watched | None) -> Forward:
        writing, silent = (self._gates(block, entries=entries) for entries in (True, False))
        kinds = frozenset(sub.kind for sub in block.sublayers)
        masks = {sub.kind: Masked(self.model, sub) for sub in block.sublayers}
        sparing = Sparing(self.model, block)

        def forward(*args: Any, **kwargs: Any) -> Any:
            stream = stream_in(*args, **kwargs)
            now = self._now or self._begin(stream, _cache_in(args, kwargs))
            skip = _settled(self.trigger.decide(block, stream, now), now)
            whole = skip is not None and skip.kinds >= kinds
            where = skip.where if skip is not None and whole else None
            gates = writing if skip is None or skip.entries or where is not None else silent
            shut: list[Gate | Masked] = []
            if skip is not None and skip.where is None:
                shut = [gate for gate in gates if gate.sublayer.kind in skip.kinds]
            elif skip is not None and not whole:
                shut = [masks[kind].to(skip.where) for kind in skip.kinds & kinds]
            for each in shut:
                each.shut()
            if where is not None:
                sparing.on(~where)
            try:
                output = original(*args, **kwargs)
            finally:
                for each in shut:
                    each.open()
                if where is not None:
                    sparing.off()
            if skip is not None and whole:
                left = stream if skip.instead is None else skip.instead
                if where is not None:
                    left = torch.where(where[..., None], left, stream_out(output))
                output = with_stream(output, left)
            self._count(gates, shut, where, now)
            if watched is not None and watched.before is not None:
                self.trigger.saw_mlp(block, *watched.taken(stream, stream_out(output)), now)
            self.trigger.saw(block, stream, stream_out(output), now)
            return output

        return forward

    def _count_all(self, ran: list[Address]) -> None:
        """Of the pass that now ends."""
        if self._now is not None:
            for unit in ran:
                self.counts.ran[unit] += self._now.rows * self._now.tokens

    def _count(self, gates: list[Gate], shut: list[Gate | Masked], where: Tensor | None, now: Pass) -> None:
        """``where``: for which tokens the whole block was left out, if not for all or none."""
        tokens = now.rows * now.tokens
        some = 0 if where is None else int(where.sum())
        for gate in gates:
            unit, left = gate.sublayer.address, tokens if gate in shut else some
            if left < tokens:
                self.counts.ran[unit] += tokens - left
            if left:
                self.counts.skipped[unit] += left
                if gate.keep_kv:
                    self.counts.projected[unit] += left


def _real(mask: Any, past: int, rows: int, tokens: int) -> Tensor | None:
    """Which tokens of a pass are no padding, bool [rows, tokens], from any form in which a stack is given its mask: a
    number a position, or, made of these for a static cache or for each kind of attention, whether each token reads each
    position, where padding does not even read itself. None where it cannot be told."""
    if isinstance(mask, dict):
        masks = [each for each in mask.values() if isinstance(each, Tensor)]
        mask = max(masks, key=lambda each: each.shape[-1], default=None)  # a sliding window has dropped positions
    if not isinstance(mask, Tensor) or mask.shape[0] != rows:
        return None
    if mask.ndim == 2:
        end = min(past + tokens, mask.shape[1])  # it may be as long as a static cache
        return mask[:, end - tokens : end].bool()
    if mask.ndim != 4 or mask.shape[2] != tokens or mask.shape[3] < past + tokens:
        return None
    itself = mask[:, 0, :, past : past + tokens].diagonal(dim1=1, dim2=2)
    return itself if itself.dtype == torch.bool else itself == 0


def _cache_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def _settled(skip: Skip | None, now: Pass) -> Skip | None:
    """The same decision without its tensor where all real tokens agree."""
    if skip is None or skip.where is None:
        return skip
    real = skip.where.new_ones(()) if now.real is None else now.real
    if not (skip.where & real).any():
        return None
    return replace(skip, where=None) if (skip.where | ~real).all() else skip
