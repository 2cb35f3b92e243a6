"""Self-speculative decoding: the model drafts with some of its units skipped and verifies the draft itself.

Zhang et al. 2023 (Draft & Verify) and Xia et al. 2024 (SWIFT). The text is the one that the model writes alone: token
for token where decoding is greedy (up to ties that the rounding of a longer forward pass decides otherwise),
identically distributed where it samples. Processors of scores (temperature, top-k, top-p, penalties) act on draft and
verification alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from billhook.anatomy import Anatomy
from billhook.anatomy.undo import Undo
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.runtime.attached import Attached
from billhook.runtime.counts import Counts
from billhook.runtime.draft import Draft
from billhook.runtime.draft_length import Confidence
from billhook.runtime.draft_loop import decode
from billhook.runtime.draft_report import Report
from billhook.runtime.draft_request import Request
from billhook.runtime.draft_search import SkipSearch


class Speculating(Attached):
    """A model whose ``generate`` speculates until ``detach``. ``reports`` has one entry a call of it."""

    reports: list[Report]


def speculate(
    model: PreTrainedModel,
    anatomy: Anatomy,
    skips: Plan | Iterable[Address | str] | SkipSearch,
    *,
    confidence: Confidence | None = None,
    give_up: bool = True,
    policy: object = "self-speculation",
) -> Speculating:
    """Let ``model.generate`` speculate, in a ``with`` block or until ``detach``.

    ``skips``: what the draft leaves out, a plan that only drops or the units; or a search, which goes on from one call
    of ``generate`` to the next while nothing else is carried over. ``give_up``: decode plainly for the rest of a call
    once rounds have been slower than plain steps, which are timed in the same run. The clock then decides when random
    numbers are drawn: switch it off where sampled text has to repeat from its seed.

    Batch 1, greedy or sampling, dynamic and static caches; streamers, stopping criteria and scores as usual. Everything
    else is refused in one line by InputError, as are models that are not decoders.
    """
    draft = Draft(model, anatomy, skips.best if isinstance(skips, SkipSearch) else skips)
    if not draft.drops:
        raise InputError("a draft that skips nothing is the model itself: say what to skip")
    search = skips if isinstance(skips, SkipSearch) else None
    reports: list[Report] = []
    plainly = model.generate

    def generate(*args: Any, streamer: Any = None, **kwargs: Any) -> Any:
        for name in ("assistant_model", "custom_generate"):
            if kwargs.get(name) is not None:
                raise InputError(f"{name} says how to decode, and so does the self-speculation on this model")

        def loop(
            model: Any, ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **inputs: Any
        ) -> Any:
            request = Request(model, ids, logits_processor, stopping_criteria, generation_config, streamer, inputs)
            reports.append(Report())
            begin = Draft(model, anatomy, search.best) if search else draft
            return decode(request, begin, replace(confidence or Confidence()), search, give_up, reports[-1])

        return plainly(*args, streamer=streamer, custom_generate=loop, **kwargs)

    def fit(undo: Undo) -> None:
        own = vars(model)
        before = own.get("generate")
        undo.then(lambda: own.pop("generate") if before is None else own.update(generate=before))
        own["generate"] = generate

    attached = Speculating(model, policy, Counts(), fit)
    attached.reports = reports
    return attached
