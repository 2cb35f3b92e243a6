"""``billhook generate``: what does a model say?"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass

from billhook import evaluate
from billhook.plan.policy_record import Drafting
from billhook.recipes.opened import opened
from billhook.runtime.catalogue import policy_of
from billhook.runtime.draft_report import drafting
from billhook.runtime.speculate import Speculating


@dataclass(frozen=True)
class Answer:
    """``drafting``: how self-speculation went; None where the model did not speculate."""

    text: str
    drafting: Drafting | None = None


def generate(
    source: str | os.PathLike[str],
    prompt: str,
    *,
    max_new_tokens: int = 100,
    policy: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Answer:
    """The greedy answer of a model, compressed ones included, to one prompt; without the prompt; under a run-time
    ``policy`` where one is named."""
    chosen = None if policy is None else policy_of(policy)
    model = opened(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code, beside=chosen is None)
    with chosen.attach(model.model, model.anatomy) if chosen else nullcontext() as attached:
        text = evaluate.generate(model.model, model.tokenizer, prompt, max_new_tokens=max_new_tokens)
    return Answer(text, drafting(attached.reports) if isinstance(attached, Speculating) else None)
