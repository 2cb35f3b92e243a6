"""The same units left out for every token."""

from __future__ import annotations

from typing import ClassVar

from transformers import PreTrainedModel

from billhook.anatomy import Anatomy
from billhook.plan.address import Address
from billhook.plan.schedule import Schedule
from billhook.runtime.attached import Attached
from billhook.runtime.constant import attach_schedule
from billhook.runtime.policy import Policy


class StaticSkip(Policy):
    """Leaves out the ``units``, addresses joined by ``+`` (``decoder.12+decoder.20.mlp``), for every token.

    Source: the constant case of the execution table (sublayer skipping at run time as in "Not All Layers of LLMs Are
    Necessary During Inference" and its kin, with a skip set fixed in advance). It computes what the same plan applied
    computes, without changing the model for good.

    Keys and values: a skipped attention has no entry in the cache for any token. State: none.
    """

    name: ClassVar[str] = "static-skip"
    paper: ClassVar[str] = ""
    kv: ClassVar[str] = "no entry for any token"

    units: str = ""

    def schedule(self) -> Schedule:
        return Schedule.skipping(Address.parse(unit.strip()) for unit in self.units.split("+") if unit.strip())

    def _attach(self, model: PreTrainedModel, anatomy: Anatomy) -> Attached:
        return attach_schedule(model, anatomy, self.schedule(), self)
