"""Adapters: merged is unmerged, ranks follow what was lost."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from families import FAMILIES, build
from hypothesis import given
from hypothesis import strategies as st

from billhook.anatomy import discover
from billhook.heal.training.as_saved import merged
from billhook.heal.training.lora import LEAST, Adapters, linears, ranks_by_loss

CAUSAL = ["llama", "gpt2", "phi3", "qwen3_moe", "falcon", "bloom", "opt", "deepseek_v3", "cohere"]


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_merged_is_unmerged(name: str) -> None:
    model = build(name)
    anatomy = discover(model)
    stack = anatomy.stacks[0]
    inputs = FAMILIES[name].inputs(model, 2, None)
    dense = model(**inputs).logits
    paths = [path for block in stack.blocks for path in linears(model, block, block.path, block.path)]
    adapters = Adapters(
        model, [block.path for block in stack.blocks], {path: 2 + i % 3 for i, path in enumerate(paths)}, seed=0
    )
    assert torch.equal(model(**inputs).logits, dense), "B begins at zero"
    generator = torch.Generator().manual_seed(3)
    for parameter in adapters.parameters.values():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    unmerged = model(**inputs).logits
    assert (unmerged - dense).abs().max() > 1e-2
    with adapters.saved():
        torch.testing.assert_close(model(**inputs).logits, unmerged, atol=2e-4, rtol=2e-4)
    assert torch.equal(model(**inputs).logits, unmerged)
    plain = build(name)
    plain.load_state_dict(merged(adapters), strict=False)
    torch.testing.assert_close(plain(**inputs).logits, unmerged, atol=2e-4, rtol=2e-4)


def test_every_linear_has_its_rank_and_no_other_module_an_adapter() -> None:
    model = build("qwen3_moe")
    stack = discover(model).stacks[0]
    paths = [path for block in stack.blocks for path in linears(model, block, block.path, block.path)]
    assert sum("mlp" in path for path in paths) == 2 * 3, "fused experts and the router have none"
    ranks = {path: 3 + i for i, path in enumerate(paths)}
    adapters = Adapters(model, [block.path for block in stack.blocks], ranks, seed=0)
    found = {name.partition(".lora_A")[0]: p.shape[0] for name, p in adapters.parameters.items() if ".lora_A" in name}
    assert found == ranks
    assert {parameter.dtype for parameter in adapters.parameters.values()} == {torch.float32}


def test_the_seed_decides() -> None:
    def first(seed: int) -> torch.Tensor:
        model = build("llama")
        path = "model.layers.0.mlp.down_proj"
        return next(iter(Adapters(model, ["model.layers.0"], {path: 4}, seed).parameters.values())).detach()

    before = torch.random.get_rng_state()
    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))
    assert torch.equal(torch.random.get_rng_state(), before), "nobody else's dice are rolled"


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=40), st.integers(1, 64))
def test_ranks_add_up_and_follow_the_loss(lost: list[float], mean: int) -> None:
    ranks = ranks_by_loss(lost, mean)
    assert sum(ranks) == mean * len(lost)
    assert min(ranks) >= min(LEAST, mean)
    pairs = sorted(zip(lost, ranks, strict=True))
    for one, other in pairwise(pairs):
        assert one[1] <= other[1] + 1, "who lost more gets no less, but for the remainder"


def test_ranks_are_proportional() -> None:
    assert ranks_by_loss([0.0, 1.0, 3.0], LEAST + 4) == [LEAST, LEAST + 3, LEAST + 9]
    assert ranks_by_loss([0.0, 0.0], 7) == [7, 7]


@torch.no_grad()
def test_an_adapter_adds_twice_its_product() -> None:
    model = build("llama")
    path = "model.layers.0.mlp.down_proj"
    before = model.get_parameter(f"{path}.weight").clone()
    adapters = Adapters(model, ["model.layers.0"], {path: 5}, seed=0)
    a, b = (next(p for name, p in adapters.parameters.items() if f"lora_{side}" in name) for side in "AB")
    b.normal_(generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(merged(adapters)[f"{path}.weight"], before + 2 * b @ a)
