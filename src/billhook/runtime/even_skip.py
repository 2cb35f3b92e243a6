"""Evenly spread blocks left out, as many as a target speed-up asks for."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.schedule import Schedule
from billhook.runtime.attached import Attached
from billhook.runtime.constant import attach_schedule
from billhook.runtime.policy import Policy


class EvenSkip(Policy):
    """Leaves out as many middle blocks as the target ``speedup`` asks for, so that those that stay are evenly spread.

    With N blocks, k = ceil(N / speedup) stay: those numbered i (N - 1) / (k - 1), rounded half up, so the first and the
    last always do; the same for every input and token. The speed-up counts blocks: time outside them (embeddings, head)
    is not bought back, so the measured one is smaller.

    Source: Unified Layer Skipping, Liu et al. 2024 (arXiv 2404.06954), which also tunes the model for it; nothing is
    tuned here. Their code rounds the distance between blocks to a whole number, here it stays exact.

    Keys and values: a skipped block has no entry in the cache for any token. State: none.
    """

    name: ClassVar[str] = "even-skip"
    paper: ClassVar[str] = "Liu et al. 2024, arXiv 2404.06954"
    kv: ClassVar[str] = "no entry for any token"
    dial: ClassVar[tuple[str, float, float]] = ("speedup", 1.0, 4.0)

    speedup: Annotated[float, Field(ge=1.0, le=100.0)] = 1.25

    def kept(self, blocks: int) -> list[int]:
        """The numbers of the blocks that stay."""
        count = -int(-blocks // self.speedup)
        if count < 2:
            raise InputError(
                f"a speed-up of {self.speedup:g} leaves fewer than the first and the last of {blocks} blocks"
            )
        return [(2 * i * (blocks - 1) + count - 1) // (2 * (count - 1)) for i in range(count)]

    def _attach(self, model: PreTrainedModel, anatomy: Anatomy) -> Attached:
        blocks = len(anatomy.stack("decoder").blocks)
        gone = sorted(set(range(blocks)) - set(self.kept(blocks)))
        schedule = Schedule.skipping(Address("decoder", i) for i in gone)
        return attach_schedule(model, anatomy, schedule, self)
