"""Sampled text is distributed as the model's own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from drafting import EAGER, write
from scipy.stats import chisquare
from torch import Tensor
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy, discover
from billhook.runtime.speculate import speculate


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6, "top_k": 3}, {"top_p": 0.7, "temperature": 1.5}])
def test_sampling_keeps_the_distribution(settings: dict[str, Any]) -> None:
    """A model that looks at the last token alone writes a Markov chain: its steps are counted in one long text and
    compared with its own probabilities, as processed; the draft has quite other ones."""
    model, anatomy, vocabulary = chain()
    torch.manual_seed(0)
    with speculate(model, anatomy, ["decoder.1.mlp"], confidence=EAGER, give_up=False) as speculating:
        text = write(model, torch.tensor([[1]]), max_new_tokens=500, do_sample=True, eos_token_id=None, **settings)[0]
    (report,) = speculating.reports
    assert 0.05 < report.acceptance < 0.95
    states = torch.arange(vocabulary)[:, None]
    seen = torch.zeros(vocabulary, vocabulary)
    for a, b in zip(text[:-1].tolist(), text[1:].tolist(), strict=True):
        seen[a, b] += 1
    expected = processed(model(states).logits[:, 0], settings) * seen.sum(-1, keepdim=True)
    assert not seen[expected == 0].any()
    likely = expected > 5
    rest = seen[~likely].sum(), expected[~likely].sum()
    counts, wanted = [*seen[likely].tolist(), float(rest[0])], [*expected[likely].tolist(), float(rest[1])]
    pairs = [(c, w) for c, w in zip(counts, wanted, strict=True) if w > 0]
    assert chisquare(*zip(*pairs, strict=True), sum_check=False).pvalue > 0.01


def processed(logits: Tensor, settings: dict[str, Any]) -> Tensor:
    """Temperature, top-k and top-p worked out by hand."""
    logits = logits / settings.get("temperature", 1.0)
    if k := settings.get("top_k"):
        logits = logits.masked_fill(logits < logits.topk(k).values[:, -1:], -torch.inf)
    p = logits.softmax(-1)
    if (top := settings.get("top_p")) is not None:
        ordered, places = p.sort(descending=True)
        kept = ordered.cumsum(-1) - ordered < top
        p = torch.zeros_like(p).scatter(-1, places, ordered * kept)
    return p / p.sum(-1, keepdim=True)


@cache
def chain() -> tuple[PreTrainedModel, Anatomy, int]:
    from families import _decoder, randomise

    model = _decoder("LlamaForCausalLM", blocks=3, vocab_size=7).build()
    randomise(model, seed=3)
    anatomy = discover(model)
    for block in anatomy.stack("decoder").blocks:
        for write_ in block.sublayers[0].writes:
            model.get_parameter(write_).zero_()
    model.generation_config.top_k = None
    return model, anatomy, 7
