"""The same questions to both models, and a score that damage lowers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from transformers import LlamaConfig, LlamaForCausalLM

from billhook.anatomy import discover
from billhook.data.questions import ITEMS, PROBES
from billhook.evaluate import probes
from billhook.evaluate.exact import Expected
from billhook.evaluate.intervals import mean_interval
from billhook.evaluate.probes import answers, paired, posed
from billhook.models import load
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.surgery import apply

V = 12


def successor() -> LlamaForCausalLM:
    """After token t it writes t + 1, by its second MLP alone: the stream holds t in its first V places, that MLP writes
    t + 1 into the others, and the head reads only those."""
    config = LlamaConfig(vocab_size=V, hidden_size=2 * V, intermediate_size=V, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    one, none = torch.eye(V), torch.zeros(V, V)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.cat([one, none], 1))
        model.lm_head.weight.copy_(torch.cat([none, one], 1))
        mlp = model.model.layers[1].mlp
        mlp.gate_proj.weight.copy_(torch.cat([one, none], 1))
        mlp.up_proj.weight.copy_(torch.cat([one, none], 1))
        mlp.down_proj.weight.copy_(torch.cat([none, one.roll(1, 0)], 0))
    return model


COUNTING = {
    "counting": [Expected((n, n + 1, n + 2, n + 3), 2) for n in range(1, 8)],
    "counting back": [Expected((n + 3, n + 2, n + 1, n), 2) for n in range(1, 8)],
}


def test_a_model_without_the_part_that_knows_answers_nothing() -> None:
    model = successor()
    anatomy = discover(model)
    idle, destroyed = (apply(model, anatomy, [Address.parse(unit)]) for unit in ("decoder.0.mlp", "decoder.1.mlp"))
    dense = answers(model, COUNTING)
    assert dense == {"counting": [True] * 7, "counting back": [False] * 7}
    assert answers(idle, COUNTING) == dense
    counting, back = paired(dense, answers(destroyed, COUNTING))
    assert (counting.dense, counting.compressed, counting.difference.value) == (1.0, 0.0, -1.0)
    assert (back.dense, back.compressed, back.difference.value) == (0.0, 0.0, 0.0)


def test_the_interval_is_of_the_paired_difference() -> None:
    dense = {"x": [True, True, True, False, False, True]}
    compressed = {"x": [True, False, True, True, False, False]}
    (found,) = paired(dense, compressed)
    assert (found.name, found.items) == ("x", 6)
    assert (found.dense, found.compressed) == pytest.approx((4 / 6, 3 / 6))
    assert found.difference == mean_interval([0, -1, 0, 1, 0, -1])


def test_a_model_against_itself_differs_nowhere(tiny_lm: Path) -> None:
    found = load(str(tiny_lm))
    model: Any = found.model
    calls: list[tuple[str, int, int]] = []
    same = probes(model, apply(model, discover(model), []), found.tokenizer, progress=lambda *c: calls.append(c))
    assert [(p.name, p.items) for p in same] == [(name, ITEMS) for name in PROBES]
    assert all(p.dense == p.compressed for p in same)
    assert all(p.difference.model_dump() == {"value": 0.0, "low": 0.0, "high": 0.0} for p in same)
    total = 2 * ITEMS * len(PROBES)
    assert calls[-1] == ("probes", total, total)
    assert [done for _, done, _ in calls] == sorted({done for _, done, _ in calls})


def test_refusals(tiny_lm: Path) -> None:
    found = load(str(tiny_lm))
    model: Any = found.model
    with pytest.raises(InputError, match="probes need a tokenizer"):
        probes(model, model, None)
    with pytest.raises(InputError, match="probes needs a causal language model: BertForMaskedLM"):
        probes(build("bert"), model, found.tokenizer)
    with pytest.raises(InputError, match="probes needs a causal language model: T5ForConditionalGeneration"):
        probes(model, build("t5"), found.tokenizer)
    with pytest.raises(InputError, match="the tokenizer does not fit the model"):
        probes(build("llama"), build("llama"), found.tokenizer)
    model.config.max_position_embeddings = 60
    with pytest.raises(InputError, match=r"probes take up to \d+ tokens, but LlamaForCausalLM has 60 positions"):
        probes(model, model, found.tokenizer)


@pytest.mark.slow
def test_a_real_model_knows_most_of_it_and_loses_it_with_its_parts(demo_folder: Path) -> None:
    found = load(str(demo_folder))
    model: Any = found.model
    asked = posed(model, found.tokenizer)
    assert max(len(one.ids) for items in asked.values() for one in items) < 128
    gone = [f"decoder.{i}.mlp" for i in (3, 4, 5, 13, 16, 26)]
    gone += [f"decoder.{i}.attention" for i in (5, 6, 7, 17, 25, 26)]
    cut = apply(model, discover(model), [Address.parse(unit) for unit in gone])
    evidence = paired(answers(model, asked), answers(cut, asked))
    assert sum(p.dense >= 0.4 for p in evidence) >= len(evidence) / 2
    assert sum(p.difference.high < 0 for p in evidence) >= len(evidence) / 2
