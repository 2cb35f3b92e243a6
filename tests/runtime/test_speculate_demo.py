"""Self-speculation on the demo model."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from billhook.anatomy import discover
from billhook.models import load
from billhook.runtime.draft_length import Confidence
from billhook.runtime.speculate import speculate

PROMPTS = 200
NEW_TOKENS = 12
SKIPS = [f"decoder.{i}" for i in (24, 26)] + [f"decoder.{i}.attention" for i in (17, 22)] + ["decoder.13.mlp"]


@pytest.mark.slow
def test_greedy_text_of_200_prompts(demo_folder: Path, shared_data: Path) -> None:
    """Token for token in float32."""
    loaded = load(demo_folder, dtype=torch.float32)
    model, anatomy = loaded.model, discover(loaded.model)
    with gzip.open(shared_data / "instructions_2000.jsonl.gz", "rt", encoding="utf-8") as lines:
        prompts = [json.loads(line)["instruction"] for line, _ in zip(lines, range(PROMPTS), strict=False)]
    eager = Confidence(longest=4, threshold=0.2)
    differing, reports = [], []
    for text in prompts:
        ids = loaded.tokenizer(text, return_tensors="pt").input_ids
        plain = model.generate(input_ids=ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        with speculate(model, anatomy, SKIPS, confidence=eager, give_up=False) as speculating:
            ours = model.generate(input_ids=ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        reports += speculating.reports
        if not torch.equal(plain, ours):
            differing.append(text)
    drafted, accepted = sum(r.drafted for r in reports), sum(r.accepted for r in reports)
    assert not differing
    assert len(prompts) == PROMPTS and PROMPTS < accepted < drafted
