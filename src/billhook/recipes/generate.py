"""``billhook generate``: what does a model say?"""

from __future__ import annotations

import os

from billhook import evaluate
from billhook.recipes.opened import opened


def generate(
    source: str | os.PathLike[str],
    prompt: str,
    *,
    max_new_tokens: int = 100,
    dtype: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> str:
    """The greedy answer of a model, compressed ones included, to one prompt; without the prompt."""
    model = opened(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    return evaluate.generate(model.model, model.tokenizer, prompt, max_new_tokens=max_new_tokens)
