"""Text that the model writes itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from billhook.data.decoding import forward
from billhook.data.windows import Windows, count_of, prefix_of
from billhook.plan.errors import InputError

ROWS = 64  # written at once: their keys and values are held


@torch.inference_mode()
def written(
    model: Any,
    tokenizer: Any,
    *,
    tokens: int,
    length: int,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Windows:
    """Sample windows from the model's own distribution (temperature 1, nothing cut off), 64 of them at once.

    Every row starts from the tokenizer's BOS (where it has none, from EOS) and goes on past any EOS, as in packed
    training text. BOS is kept in the window only where the tokenizer would put it. The same seed gives the same text
    on one machine. Cost: ``length`` decode steps for every 64 windows.
    """
    if tokenizer is None or not hasattr(model, "can_generate") or not model.can_generate():
        raise InputError("calibration source self needs a model that writes text; give a text file")
    if model.config.is_encoder_decoder:
        raise InputError("calibration source self needs a decoder-only model; give a text file")
    kept = prefix_of(tokenizer)
    start = kept or [next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), 0)]
    rows = count_of(tokens, length)
    generator = torch.Generator().manual_seed(seed)
    training = model.training
    model.eval()
    try:
        drawn = _sample(model, torch.tensor([start] * rows), length - len(kept), generator, progress)
    finally:
        model.train(training)
    ids = torch.cat([torch.tensor([kept] * rows, dtype=torch.int64), drawn], dim=1)
    return Windows.of(ids, f"self, seed {seed}")


def _sample(model: Any, ids: torch.Tensor, steps: int, generator: torch.Generator, progress: Any) -> torch.Tensor:
    written: list[torch.Tensor] = []
    parts = torch.split(ids, ROWS)
    for part in parts:
        cache, drawn = None, [part[:, :0]]
        for _ in range(steps):
            logits, cache = forward(model, part.to(model.device), cache)
            chances = torch.softmax(logits[:, -1].float().cpu(), dim=-1)
            part = torch.multinomial(chances, 1, generator=generator)
            drawn.append(part)
            if progress:
                progress("writing text", len(written) * steps + len(drawn) - 1, len(parts) * steps)
        written.append(torch.cat(drawn, dim=1))
    return torch.cat(written)
