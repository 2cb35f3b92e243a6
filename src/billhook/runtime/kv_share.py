"""Blocks that attend to the keys and values of an earlier one, whose cache alone is kept."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy
from billhook.anatomy.undo import Undo
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.runtime.attached import Attached
from billhook.runtime.counts import Counts
from billhook.runtime.kv_lending import STACK, attention_of, kinds, lend, nearest
from billhook.runtime.numbers import read_numbers
from billhook.runtime.policy import Policy
from billhook.runtime.silence import place, without_keys_and_values


class KvShare(Policy):
    """Of every ``span`` blocks in a row only the first keeps keys and values; the others attend to its. A span of 1
    shares nothing. With ``blocks`` these share instead, each with the nearest block before it that keeps its own.

    Only like is shared with like: as many heads of the same width, the same window, the same way to hold positions. So
    where a model has blocks of several kinds, spans run over the blocks of one kind, and the first of each always
    keeps its own.

    Source: "Stochastic KV Routing: Enabling Adaptive Depth-Wise Cache Sharing" (arXiv 2604.22782, the abstract), where
    a model is first trained with random sharing: ``--heal kv-routing`` does. Chosen here: the spans, and the nearest.

    Keys and values: those of the lender, rotated as in its own attention, for every token of prompt and answer; a
    block that shares makes none (where they come from linears of their own, these are left out) and has no entry in
    the cache. State: none.
    """

    name: ClassVar[str] = "kv-share"
    paper: ClassVar[str] = "Filippova et al. 2026, arXiv 2604.22782"
    kv: ClassVar[str] = "an earlier block's, no entry of its own"
    dial: ClassVar[tuple[str, float, float]] = ("span", 1, 8)
    spares: ClassVar[Literal["flops", "kv_bytes"]] = "kv_bytes"

    span: Annotated[int, Field(ge=1, le=64)] = 2
    blocks: str = ""

    def turned(self, *values: float) -> Self:
        return type(self).of({**self.model_dump(), "span": round(values[0])})

    def lenders(self, kinds: Mapping[int, Hashable]) -> dict[int, int]:
        """For each block that shares, the one whose keys and values it reads. InputError for one that cannot."""
        if not self.blocks:
            ranks: dict[Hashable, int] = {}
            borrowing = set()
            for number, kind in sorted(kinds.items()):
                rank = ranks[kind] = ranks.get(kind, -1) + 1
                if rank % self.span:
                    borrowing.add(number)
            return nearest(kinds, borrowing)
        asked = set(read_numbers(self.blocks))
        found = nearest(kinds, asked)
        alone = sorted(asked - found.keys())
        if alone:
            raise InputError(
                f"policy kv-share: block {alone[0]} cannot share: "
                + ("no block before it keeps keys and values like its own" if alone[0] in kinds else "it makes none")
            )
        return found

    def _attach(self, model: PreTrainedModel, anatomy: Anatomy) -> Attached:
        like, last = kinds(model, anatomy), len(anatomy.stack(STACK).blocks) - 1
        absent = [number for number in read_numbers(self.blocks) if number > last]
        if absent:
            raise InputError(f"policy kv-share: there is no block {absent[0]}; the decoder has 0 to {last}")
        lenders = self.lenders(like)
        counts = Counts(borrowing=frozenset(Address(STACK, number, "attention") for number in lenders))

        def fit(undo: Undo) -> None:
            if not lenders:
                return
            stack = anatomy.stack(STACK)
            lend(model, stack, lenders, undo)
            for number in lenders:
                attention = attention_of(stack.blocks[number].sublayers)
                assert attention is not None
                for linear, forward in without_keys_and_values(model, attention):
                    place(linear, forward, undo)

        return Attached(model, self, counts, fit)
