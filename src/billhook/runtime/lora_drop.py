"""Middle blocks that are computed at every n-th token only, with a low-rank correction in between."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy
from billhook.data import Windows
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.schedule import Schedule, Site
from billhook.runtime.attached import Attached
from billhook.runtime.gaps import Gaps
from billhook.runtime.in_turns import Correction, Reuse, attach_turns
from billhook.runtime.low_rank import Factors, fit_factors
from billhook.runtime.numbers import read_numbers
from billhook.runtime.policy import Policy


class LoraDrop(Policy):
    """While tokens are generated the ``blocks`` of the decoder are computed at every ``period``-th token; in between
    each reuses its state of the token before, corrected by a map of low ``rank``.

        y[t] = x[t] + (y[t-1] - x[t-1]) + A B (x[t] - x[t-1])     for reuse "update"
        y[t] = y[t-1] + A B (x[t] - x[t-1])                       for reuse "state"

    with x the stream into and y the stream out of the block. A [hidden, rank] and B [rank, hidden] are fitted by
    ``fitted`` (reduced-rank least squares over consecutive tokens of a text, see ``low_rank``); rank 0 has no
    correction. ``period`` 1 leaves nothing out. Without ``blocks`` it is the middle half.

    Source: LoRA-Drop (temporal low-rank decoding; S. H. Bavandpour and others, repository hosseinbv/LoRA-Drop): the
    previous token's hidden state plus a low-rank correction, refreshed periodically. There the correction is trained by
    gradients together with the model. Chosen here: the closed form, and "update" by default, since the residual path
    carries the token itself and "state" would put the token before in its place.

    Keys and values: with ``writes`` "all" they are projected: on a cheap step a block makes those of its token from
    x[t], so the cache has no gaps under any mask or cache type. With "refresh" it makes none, as the paper can, and
    later tokens do not attend to that token in that block: work and cache are saved as well. That takes a decoder
    language model without windows, a cache that grows, and leaves the first block alone (``Gaps`` says why).
    Such a cache is for this run alone: without the policy nothing makes masks that fit it. State: x and y of the last
    token of each block; see ``in_turns`` for when it is dropped.
    """

    name: ClassVar[str] = "lora-drop"
    paper: ClassVar[str] = "LoRA-Drop, repository hosseinbv/LoRA-Drop"
    kv: ClassVar[str] = "projected from the stream; with writes=refresh no entry for tokens of cheap steps"
    dial: ClassVar[tuple[str, float, float]] = ("period", 1, 8)
    wants_text: ClassVar[bool] = True

    blocks: str = ""
    period: Annotated[int, Field(ge=1, le=64)] = 2
    rank: Annotated[int, Field(ge=0)] = 0
    reuse: Reuse = "update"
    writes: Literal["all", "refresh"] = "all"

    _factors: dict[Address, Factors] = PrivateAttr(default_factory=dict)

    def chosen(self, anatomy: Anatomy) -> list[Address]:
        """The blocks that are reused. InputError for one that is not there."""
        count = len(anatomy.stack("decoder").blocks)
        numbers = read_numbers(self.blocks) or list(range(count // 4, count - count // 4))
        if max(numbers) >= count:
            raise InputError(f"policy lora-drop: there is no block {max(numbers)}; the decoder has 0 to {count - 1}")
        return [Address("decoder", number) for number in sorted(set(numbers))]

    def schedule(self, anatomy: Anatomy) -> Schedule:
        cheap = tuple(Site(unit=unit, verb="reuse") for unit in self.chosen(anatomy))
        return Schedule(tables=((), *[cheap] * (self.period - 1)))

    def fitted(self, model: PreTrainedModel, anatomy: Anatomy, windows: Windows) -> Self:
        """With the corrections fitted on the windows, unless it has them; at rank 0 there is nothing to fit. InputError
        for a rank above the width of the stream."""
        if not self.rank or self._factors:
            return self
        width = anatomy.outline.stack("decoder").hidden_size
        if self.rank > width:
            raise InputError(
                f"policy lora-drop: the stream is {width} wide, a correction of rank {self.rank} is too much"
            )
        units, residual = self.chosen(anatomy), self.reuse == "update"
        return self._with(fit_factors(model, anatomy, units, windows, rank=self.rank, residual=residual))

    def turned(self, *values: float) -> Self:
        return type(self).of({**self.model_dump(), "period": round(values[0])})._with(self._factors)

    def tensors(self) -> dict[str, Tensor]:
        """The corrections, by name, for a file beside the policy's."""
        return {f"{unit}.{part}": t for unit, pair in self._factors.items() for part, t in zip("AB", pair, strict=True)}

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        found: dict[Address, Factors] = {}
        for name, down in tensors.items():
            unit, _, part = name.rpartition(".")
            up = tensors.get(f"{unit}.B", torch.zeros(0))
            if part == "A" and down.ndim == 2 and up.shape == down.shape[::-1] and down.shape[1] <= self.rank:
                found[Address.parse(unit)] = down, up
        if 2 * len(found) != len(tensors):
            raise InputError(
                f"policy lora-drop: its tensors must be A [hidden, rank] and B [rank, hidden] of each block, of rank "
                f"{self.rank} at most"
            )
        return self._with(found)

    def _with(self, factors: dict[Address, Factors]) -> Self:
        return self.model_copy()._holding(factors)

    def _holding(self, factors: dict[Address, Factors]) -> Self:
        self._factors = factors
        return self

    def _attach(self, model: PreTrainedModel, anatomy: Anatomy) -> Attached:
        if self.rank and not self._factors:
            raise InputError(
                "policy lora-drop: a rank above 0 needs corrections fitted on text first (tune-policy does)"
            )
        chosen, width = self.chosen(anatomy), anatomy.outline.stack("decoder").hidden_size
        if self._factors and (
            self._factors.keys() != set(chosen) or any(len(down) != width for down, _ in self._factors.values())
        ):
            raise InputError("policy lora-drop: its corrections are for other blocks than these, or for another model")
        corrections = {unit: _correction(pair) for unit, pair in self._factors.items()}
        gaps = None if self.writes == "all" else Gaps(model, anatomy, chosen)
        return attach_turns(model, anatomy, self.schedule(anatomy), self, self.reuse, corrections, gaps)


def _correction(factors: Factors) -> Correction:
    placed: dict[torch.device, Factors] = {}  # where the stream is, wherever a library keeps the weights

    def correction(change: Tensor) -> Tensor:
        if change.device not in placed:
            placed[change.device] = factors[0].to(change), factors[1].to(change)
        out, into = placed[change.device]
        return change @ into.T @ out.T

    return correction
