"""``billhook generate``: what does a model say?"""

from __future__ import annotations

import os
from contextlib import nullcontext

from billhook import evaluate
from billhook.recipes.opened import opened
from billhook.runtime.catalogue import policy_of


def generate(
    source: str | os.PathLike[str],
    prompt: str,
    *,
    max_new_tokens: int = 100,
    policy: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> str:
    """The greedy answer of a model, compressed ones included, to one prompt; without the prompt; under a run-time
    ``policy`` where one is named."""
    chosen = policy_of(policy) if policy else None
    model = opened(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    with chosen.attach(model.model, model.anatomy) if chosen else nullcontext():
        return evaluate.generate(model.model, model.tokenizer, prompt, max_new_tokens=max_new_tokens)
