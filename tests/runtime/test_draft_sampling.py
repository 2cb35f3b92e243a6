"""Sampled text is distributed as the model's own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from drafting import EAGER, write
from scipy.stats import chi2_contingency, chisquare
from torch import Tensor
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy, discover
from billhook.plan.plan import Plan
from billhook.runtime.draft_report import Report
from billhook.runtime.speculate import speculate
from billhook.surgery import simulate


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


@pytest.mark.parametrize("settings", [{"temperature": 0.6}, {"temperature": 0.8, "top_k": 3}])
def test_whole_continuations_are_distributed_as_the_models_own(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two samples, of the model with and without speculation, where every token depends on all before it. What is not
    the model's own is told apart by as many texts: another temperature, and the draft alone."""
    monkeypatch.setattr(Report, "wants_plain", False)  # draft at once, not after three plain steps
    model, anatomy, vocabulary = reader()
    skips = ["decoder.1", "decoder.2.mlp"]
    torch.manual_seed(1)
    plain = counted(sampled(model, 8000, **settings), vocabulary)
    with speculate(model, anatomy, skips, confidence=EAGER, give_up=False) as speculating:
        rows = torch.cat([sampled(model, 1, **settings) for _ in range(TEXTS)])
    drafted = sum(report.drafted for report in speculating.reports)
    accepted = sum(report.accepted for report in speculating.reports)
    assert 0.2 < accepted / drafted < 0.9
    assert same(counted(rows, vocabulary), plain) > 0.01
    hotter = settings | {"temperature": 2 * settings.get("temperature", 1.0)}
    assert same(counted(sampled(model, TEXTS, **hotter), vocabulary), plain) < 1e-3
    with simulate(model, anatomy, Plan.of(skips)):
        assert same(counted(sampled(model, TEXTS, **settings), vocabulary), plain) < 1e-3


TEXTS = 400
NEW = 4


def sampled(model: PreTrainedModel, texts: int, **settings: Any) -> Tensor:
    """Continuations [texts, NEW] of one prompt."""
    settings = {
        "do_sample": True,
        "eos_token_id": None,
        "max_new_tokens": NEW,
        "num_return_sequences": texts,
    } | settings
    return write(model, torch.tensor([[1, 4, 2]]), **settings)[:, -NEW:]


def counted(rows: Tensor, vocabulary: int) -> Tensor:
    """How often each continuation was written."""
    numbers = rows @ vocabulary ** torch.arange(NEW)
    return torch.bincount(numbers, minlength=vocabulary**NEW).double()


def same(some: Tensor, many: Tensor) -> float:
    """The p-value of both samples having one distribution; continuations too rare for the test are one."""
    table = torch.stack([some, many])
    rare = table.sum(0) * float(some.sum() / table.sum()) < 5
    table = torch.cat([table[:, ~rare], table[:, rare].sum(1, keepdim=True)], dim=1)
    return float(chi2_contingency(table[:, table.sum(0) > 0]).pvalue)


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


@cache
def reader() -> tuple[PreTrainedModel, Anatomy, int]:
    """A model whose next token depends on all tokens so far."""
    from families import _decoder, randomise

    model = _decoder("LlamaForCausalLM", blocks=3, vocab_size=7).build()
    randomise(model, seed=3)
    model.get_output_embeddings().weight.mul_(0.5)  # several continuations are likely
    model.generation_config.top_k = None
    return model, discover(model), 7
