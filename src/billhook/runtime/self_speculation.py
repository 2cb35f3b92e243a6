"""Self-speculative decoding as a policy: parameters in words, for the command line and for files."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy
from billhook.runtime.attached import Attached
from billhook.runtime.draft_length import Confidence
from billhook.runtime.draft_search import SkipSearch
from billhook.runtime.policy import Policy
from billhook.runtime.speculate import speculate


class SelfSpeculation(Policy):
    """Drafts without the ``units``, addresses joined by ``+`` (``decoder.12+decoder.20.mlp``), and verifies with the
    whole model: the text stays what it is, see ``speculate``.

    Without units a search on the text being written chooses ``share`` of the sublayers. Up to ``longest`` tokens are
    drafted while the draft's highest probability is at least ``threshold``, which adapts. ``give_up``: decode plainly
    for the rest of a call once that is measured to be faster.

    Source: Draft & Verify, Zhang et al. 2023 (arXiv 2309.08168); SWIFT, Xia et al. 2024 (arXiv 2410.06916). Chosen
    here: see ``Confidence`` and ``SkipSearch``.

    Keys and values: verified tokens have those of the full model, in every block; the draft reads them and writes its
    own beside them, which are thrown away. State: the best skips, from call to call, where they are searched for.
    """

    name: ClassVar[str] = "self-speculation"
    paper: ClassVar[str] = "Zhang et al. 2023, arXiv 2309.08168; Xia et al. 2024, arXiv 2410.06916"
    kv: ClassVar[str] = "those of the full model for every verified token"

    units: str = ""
    share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.45
    longest: Annotated[int, Field(ge=1)] = 8
    threshold: Annotated[float, Field(ge=0.0, le=1.0)] = 0.6
    give_up: bool = True

    def _attach(self, model: PreTrainedModel, anatomy: Anatomy) -> Attached:
        units = [unit.strip() for unit in self.units.split("+") if unit.strip()]
        rule = Confidence(longest=self.longest, threshold=self.threshold)
        skips = units or SkipSearch(anatomy, self.share)
        return speculate(model, anatomy, skips, confidence=rule, give_up=self.give_up, policy=self)
