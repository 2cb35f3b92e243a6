"""A chain of layers: blocks skipped, looped and reordered."""

from __future__ import annotations

from typing import ClassVar

from transformers import PreTrainedModel

from billhook.anatomy import Anatomy
from billhook.plan.errors import InputError
from billhook.plan.schedule import Schedule
from billhook.runtime.attached import Attached
from billhook.runtime.constant import attach_schedule
from billhook.runtime.numbers import read_numbers
from billhook.runtime.policy import Policy


class Chain(Policy):
    """Runs the ``blocks`` of the decoder in the order given, such as ``0-11+11+13-29``; the empty text is the model's
    own.

    Source: CoLa, "Skip a Layer or Loop it? Test-Time Depth Adaptation of Pretrained LLMs" (arXiv 2507.07996), which
    looks for such a chain for every sample by tree search; ``search.tree`` does, see ``search.chains``.

    Keys and values: every visit of a block has cache slots of its own, a block that is not visited has none; so the
    chain must stay the same for a whole generation. State: none.
    """

    name: ClassVar[str] = "chain"
    paper: ClassVar[str] = "Li et al. 2025, arXiv 2507.07996"
    kv: ClassVar[str] = "one entry a visit, none for a block not visited"

    blocks: str = ""

    def _attach(self, model: PreTrainedModel, anatomy: Anatomy) -> Attached:
        visits = read_numbers(self.blocks)
        count = len(anatomy.stack("decoder").blocks)
        if visits and max(visits) >= count:
            raise InputError(f"policy chain: there is no block {max(visits)}; the decoder has 0 to {count - 1}")
        schedule = Schedule.chain(visits) if visits else Schedule()
        return attach_schedule(model, anatomy, schedule, self)
