"""Text that the model writes itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from billhook.data.decoding import forward
from billhook.data.one_query import one_query_at_a_time
from billhook.data.sampling import drawn
from billhook.data.text import Text
from billhook.data.windows import Windows, count_of, prefix_of, spread
from billhook.plan.errors import InputError

ROWS = 64  # written at once: their keys and values are held
PROMPT = 32  # tokens of a text that the model goes on from
PIECE = 128  # tokens after which it is given others, lest it drift from the text


@torch.inference_mode()
def written(
    model: Any,
    tokenizer: Any,
    *,
    tokens: int,
    length: int,
    seed: int = 0,
    prompts: Text | None = None,
    name: str = "self",
    progress: Callable[[str, int, int], None] | None = None,
) -> Windows:
    """Sample windows from the model's own distribution (temperature 1, nothing cut off), 64 of them at once.

    Every row starts from the tokenizer's BOS (where it has none, from EOS) and goes on past any EOS, as in packed
    training text. BOS is kept in the text only where the tokenizer would put it. With ``prompts`` each window is
    written in pieces of 128 tokens or a little less, each of which goes on from 32 tokens of that text (a quarter of a
    shorter piece), taken evenly from it, which stay in the window: answers of the model in the user's own field, as
    Nepal et al. 2026 (arXiv 2602.01997) train on; how prompts are taken, and that they come anew, is chosen here. Where
    there are too few, a window goes on from its own ones again. The same seed gives the same text on one machine. Cost:
    for every 64 windows or pieces as many decode steps as they have tokens. InputError for a model that does not write
    text, and for fewer prompts than windows.
    """
    if tokenizer is None or not hasattr(model, "can_generate") or not model.can_generate():
        raise InputError("calibration source self needs a model that writes text; give a text file")
    if model.config.is_encoder_decoder:
        raise InputError("calibration source self needs a decoder-only model; give a text file")
    kept = prefix_of(tokenizer)
    start = kept or [next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), 0)]
    rows, pieces = count_of(tokens, length), 1
    if prompts is None:
        first, known = torch.tensor([start] * rows), torch.tensor([kept] * rows, dtype=torch.int64)
    else:
        pieces = -(-length // PIECE)
        size = max(len(kept) + 1, min(PROMPT, length // pieces // 4))
        enough = rows * pieces * size
        found = spread(prompts, tokenizer, tokens=enough, length=size, seed=seed, fewest=rows * size).ids
        own = torch.arange(pieces) % (len(found) // rows)  # no two windows share one: some judge what others teach
        first = known = found[((torch.arange(rows) * len(found) // rows)[:, None] + own).flatten()]
    steps = -(-length // pieces) - known.shape[1]
    generator = torch.Generator().manual_seed(seed)
    training = model.training
    model.eval()
    try:
        with one_query_at_a_time():
            rest = _sample(model, first, steps, generator, progress)
    finally:
        model.train(training)
    ids = torch.cat([known, rest], dim=1).reshape(rows, -1)[:, :length]
    return Windows.of(ids, f"{name}, seed {seed}")


def _sample(model: Any, ids: torch.Tensor, steps: int, generator: torch.Generator, progress: Any) -> torch.Tensor:
    written: list[torch.Tensor] = []
    parts = torch.split(ids, ROWS)
    for part in parts:
        cache, columns = None, [part[:, :0]]
        for _ in range(steps):
            logits, cache = forward(model, part.to(model.device), cache)
            chances = torch.softmax(logits[:, -1].float().cpu(), dim=-1)
            part = drawn(chances, generator)[:, None]
            columns.append(part)
            if progress:
                progress("writing text", len(written) * steps + len(columns) - 1, len(parts) * steps)
        written.append(torch.cat(columns, dim=1))
    return torch.cat(written)
