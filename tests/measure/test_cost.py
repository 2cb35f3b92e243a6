"""The cost model is checked against what real models hold, count and write."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from hypothesis import given
from hypothesis import strategies as st
from outlines import block, outline, stack
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from billhook.anatomy import discover
from billhook.measure.cost import UNITS, CostModel, cost, quantities
from billhook.plan.address import Address
from billhook.plan.check import unsound
from billhook.surgery import apply

# Norms and biases count as weights, which shows at a width of 32; a real model is within a percent.
FLOPS_TOLERANCE = 0.05
DECODERS = [n for n, f in FAMILIES.items() if f.generates and list(f.stacks) == ["decoder"]]
PAIRS = [n for n, f in FAMILIES.items() if f.generates and "encoder" in f.stacks]
UNCOUNTED = {
    "falcon_alibi": "its attention is a fused kernel, which the counter does not see on a CPU",
    "falcon_new": "its attention is a fused kernel, which the counter does not see on a CPU",
    "deepseek_v3": "transformers expands the whole latent cache in every step",
    "gemma4": "the input gates of its blocks run beside the sublayers",
}
PAPER = outline(stack([block(100 + i, 300 - i) for i in range(3)], "encoder", False), stack([block(rest=7)] * 2), 3)
ALL_UNITS = [a for a, _ in PAPER.blocks()] + [a for a, _ in PAPER.sublayers()]


def eager(name: str) -> PreTrainedModel:
    """With plain matrix products, which the counter of FLOPs sees."""
    model = build(name)
    model.set_attn_implementation("eager")
    if name in ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3"):
        model.set_experts_implementation("eager")
    return model


def generate(model: PreTrainedModel, new_tokens: int, **inputs: Any) -> tuple[int, int]:
    """FLOPs of a forced-length generation, and bytes of the cache it leaves."""
    forced = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = model.generate(**inputs, **forced, return_dict_in_generate=True)
    return counter.get_total_flops(), sum(t.nbytes for t in cached(result.past_key_values))


def cached(cache: Any) -> Iterable[torch.Tensor]:
    halves = [cache.self_attention_cache, cache.cross_attention_cache] if hasattr(cache, "is_updated") else [cache]
    layers = [layer for half in halves for layer in half.layers]
    return [tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None]


@pytest.mark.parametrize("name", DECODERS)
def test_generation_token_by_token(name: str) -> None:
    """From one token on every step sees exactly the keys that the causal mask allows, windows included."""
    model = eager(name)
    flops, cache = generate(model, 12, input_ids=torch.tensor([[5]]))
    expected = cost(discover(model).outline, prompt_tokens=1, new_tokens=12)
    assert expected["kv_bytes"] * 12 == pytest.approx(cache)
    assert expected["memory"] == pytest.approx(expected["size"] + cache)
    if name not in UNCOUNTED:
        assert expected["flops"] == pytest.approx(flops, rel=FLOPS_TOLERANCE)


@pytest.mark.parametrize("name", PAIRS)
def test_generation_of_an_encoder_decoder(name: str) -> None:
    model = eager(name)
    inputs = FAMILIES[name].prompt(model)
    source = model.get_encoder()(**inputs)[0].shape[1]
    flops, cache = generate(model, 8, **inputs)
    expected = cost(discover(model).outline, prompt_tokens=source, new_tokens=8)
    assert expected["kv_bytes"] * (source + 8) == pytest.approx(cache)
    assert expected["memory"] == pytest.approx(expected["size"] + cache)
    assert expected["flops"] == pytest.approx(flops, rel=FLOPS_TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe", "deepseek_v3", "bert", "vit", "dinov2"])
def test_what_a_dropped_block_saves_in_one_pass(name: str) -> None:
    """Of a causal stack the counter sees the whole square of pairs, so the prompt is one token there."""
    model = eager(name)
    anatomy = discover(model)
    name_of_stack = anatomy.stacks[0].name
    inputs = FAMILIES[name].inputs(model, 1, None)
    if anatomy.stacks[0].causal:
        inputs = {"input_ids": inputs["input_ids"][:, :1]}
    unit = Address(name_of_stack, 1)

    def flops(of: torch.nn.Module) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            of(**inputs, output_hidden_states=True)
        return counter.get_total_flops()

    with torch.no_grad():
        length = model(**inputs, output_hidden_states=True).hidden_states[0].shape[1]
    saved = flops(model) - flops(apply(model, anatomy, [unit]))
    predicted = CostModel(anatomy.outline, prompt_tokens=length, new_tokens=0).saving(unit)["flops"]
    assert predicted == pytest.approx(saved, rel=FLOPS_TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_and_file_size(name: str, tmp_path: Path) -> None:
    model = build(name)
    anatomy = discover(model)
    choices = random.Random(name)
    units = [a for a, _ in anatomy.outline.sublayers() if str(a) not in anatomy.outline.pinned]
    drops = frozenset(choices.sample(units, 3))
    while unsound(drops, anatomy.outline):
        drops = frozenset(choices.sample(units, 3))

    def counted(of: torch.nn.Module) -> int:
        return sum(p.numel() for p in of.parameters())

    predicted = cost(anatomy.outline)["params"] - cost(anatomy.outline, drops)["params"]
    assert counted(model) - counted(apply(model, anatomy, drops)) == predicted > 0

    model.save_pretrained(tmp_path)
    assert cost(anatomy.outline)["size"] == pytest.approx(weight_bytes(tmp_path), rel=0.002)


def weight_bytes(folder: Path) -> int:
    total = 0
    for file in folder.glob("*.safetensors"):
        header = int.from_bytes(file.read_bytes()[:8], "little")
        total += file.stat().st_size - 8 - header
    return total


@given(st.frozensets(st.sampled_from(ALL_UNITS)), st.sampled_from(ALL_UNITS))
def test_savings_add_up(drops: frozenset[Address], unit: Address) -> None:
    model = CostModel(PAPER, prompt_tokens=20, new_tokens=5)
    before, after = model.of(drops), model.of(drops | {unit})
    saved = model.saving(unit, drops)
    assert {kind: before[kind] - after[kind] for kind in before} == pytest.approx(saved)


def test_a_block_is_gone_when_all_of_it_is() -> None:
    model = CostModel(outline(3))
    attention, mlp = Address("decoder", 1, "attention"), Address("decoder", 1, "mlp")
    assert model.saving(attention)["blocks"] == 0
    assert model.saving(mlp, {attention})["blocks"] == 1
    assert model.of({attention, mlp}) == model.of({Address("decoder", 1)})
    assert model.of({attention, mlp})["blocks"] == 2


def test_experts_that_a_token_skips_cost_no_flops() -> None:
    drawn = discover(build("mixtral")).outline
    model = CostModel(drawn, prompt_tokens=1, new_tokens=0)
    unit = Address("decoder", 1, "mlp")
    saved = model.saving(unit)
    assert saved["flops"] < 2 * saved["params"] == 2 * dict(drawn.sublayers())[unit].params


def test_longer_workloads() -> None:
    drawn = outline(2)
    short, long = (cost(drawn, prompt_tokens=n, new_tokens=1)["flops"] for n in (10, 20))
    # 2 x 400 weights a token, 4 x 2 heads x 4 channels a pair, in each of 2 blocks; the head once
    assert short == 2 * (2 * 400 * 10 + 32 * 55) + 2 * 40
    assert long == 2 * (2 * 400 * 20 + 32 * 210) + 2 * 40
    assert cost(drawn, prompt_tokens=10, new_tokens=0) == cost(drawn, prompt_tokens=10, new_tokens=1)
    assert cost(drawn, prompt_tokens=10, new_tokens=11)["kv_bytes"] == cost(drawn, prompt_tokens=20)["kv_bytes"] == 32


def test_quantities_name_their_units() -> None:
    table = quantities(outline(4), [Address("decoder", 1)])
    assert list(table) == list(UNITS)
    assert (table["blocks"].dense, table["blocks"].compressed) == (4, 3)
    assert (table["params"].dense, table["params"].compressed) == (1600, 1200)
    assert table["size"].dense - table["size"].compressed == 800
