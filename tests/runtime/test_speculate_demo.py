"""Self-speculation on the demo model."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from billhook.anatomy import discover
from billhook.models import load
from billhook.runtime.draft_length import Confidence
from billhook.runtime.speculate import speculate

PROMPTS = 200
NEW_TOKENS = 12
SKIPS = [f"decoder.{i}" for i in (24, 26)] + [f"decoder.{i}.attention" for i in (17, 22)] + ["decoder.13.mlp"]


@pytest.mark.slow
def test_greedy_text_of_200_prompts(demo_folder: Path, shared_data: Path) -> None:
    """Token for token in float32. Plain texts are written in batches of one length, which need no padding: far less
    time than one by one."""
    loaded = load(demo_folder, dtype=torch.float32)
    model, anatomy = loaded.model, discover(loaded.model)
    with gzip.open(shared_data / "instructions_2000.jsonl.gz", "rt", encoding="utf-8") as lines:
        prompts = [json.loads(line)["instruction"] for line, _ in zip(lines, range(PROMPTS), strict=False)]
    given = [loaded.tokenizer(text, return_tensors="pt").input_ids for text in prompts]
    padding = loaded.tokenizer.pad_token_id
    greedy = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": padding}
    plain: dict[int, Tensor] = {}
    for length in {ids.shape[1] for ids in given}:
        alike = [i for i, ids in enumerate(given) if ids.shape[1] == length]
        rows = torch.cat([given[i] for i in alike])
        written = model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **greedy)
        plain |= zip(alike, written, strict=True)
    with speculate(
        model, anatomy, SKIPS, confidence=Confidence(longest=4, threshold=0.2), give_up=False
    ) as speculating:
        ours = [model.generate(input_ids=ids, **greedy)[0] for ids in given]
    # a row that ends before the others of its batch is filled up with padding
    ends = [torch.cat([text, text.new_full((len(plain[i]) - len(text),), padding)]) for i, text in enumerate(ours)]
    differing = [prompts[i] for i, text in enumerate(ends) if not torch.equal(plain[i], text)]
    drafted, accepted = (sum(getattr(r, name) for r in speculating.reports) for name in ("drafted", "accepted"))
    assert not differing
    assert len(prompts) == PROMPTS and PROMPTS < accepted < drafted
