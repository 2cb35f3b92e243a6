"""The promises of surgery for narrower sublayers, on every family."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, _decoder, build, params
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from live import assert_cache_is_exact, generate, inputs_of, logits, snapshot
from torch import Tensor, nn
from transformers import PreTrainedModel
from widths import keep, masked, narrowings, plans

from billhook.anatomy import Anatomy, discover
from billhook.measure.cost import cost
from billhook.plan.address import Address
from billhook.plan.plan import Keep, Plan
from billhook.plan.target import Target
from billhook.surgery import apply, simulate
from billhook.surgery.reopen import on_meta

few = settings(max_examples=2, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])

#: Norms of queries and keys that run over all heads: without some of them the others are normed differently.
NORM_OVER_HEADS = ("olmo2", "olmoe")


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@cache
def dense(name: str) -> tuple[PreTrainedModel, Anatomy]:
    """One model a family for the whole file: every test has to leave it as it was."""
    model = build(name)
    return model, discover(model)


@pytest.mark.parametrize("name", params)
@given(data=st.data())
@few
def test_simulated_and_applied_agree_and_cost_what_was_predicted(name: str, data: st.DataObject) -> None:
    model, anatomy = dense(name)
    plan = data.draw(plans(anatomy))
    before = snapshot(model)
    applied = apply(model, anatomy, plan)
    assert snapshot(model) == before
    with simulate(model, anatomy, plan) as simulated:
        for batch, padding in inputs_of(name)[-1:]:
            expected = logits(name, simulated, batch, padding)
            assert torch.isfinite(expected).all()
            assert torch.equal(logits(name, applied, batch, padding), expected)
        if FAMILIES[name].generates:
            expected = assert_cache_is_exact(name, simulated)
            assert all(map(torch.equal, generate(name, applied, use_cache=True), expected))
    assert snapshot(model) == before
    gone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in applied.parameters())
    dense_cost, predicted = cost(anatomy.outline), cost(anatomy.outline, plan.drops, plan.keeps)
    assert gone == dense_cost["params"] - predicted["params"]
    redrawn = discover(applied).outline
    assert cost(redrawn)["kv_bytes"] == pytest.approx(predicted["kv_bytes"])
    assert cost(redrawn)["flops"] == pytest.approx(predicted["flops"])


@pytest.mark.parametrize("name", params)
def test_what_is_cut_wrote_nothing_else(name: str) -> None:
    """Against the dense model with the writing weights of the same units set to zero."""
    model, anatomy = dense(name)
    keeps = [
        edit
        for edit in narrowings(anatomy, 3, pick=lambda _, inner: max(inner.count // 2, inner.least))
        if edit.inner == "neuron" or (edit.inner == "group" and name not in NORM_OVER_HEADS)
    ]
    applied = apply(model, anatomy, Plan.of([], keeps=keeps))
    intact = logits(name, model, 2, None)
    with masked(model, anatomy, keeps):
        for batch, padding in inputs_of(name):
            expected = logits(name, model, batch, padding)
            torch.testing.assert_close(logits(name, applied, batch, padding), expected, atol=2e-5, rtol=1e-5)
        assert not keeps or not torch.allclose(logits(name, model, 2, None), intact, atol=1e-3)


@pytest.mark.parametrize("name", params)
def test_keeping_everything_changes_nothing(name: str) -> None:
    model, anatomy = dense(name)
    plan = Plan.of([], keeps=narrowings(anatomy, 0, pick=lambda _, inner: inner.count))
    assert len(plan.keeps) == len(anatomy.inner)
    kept = (applied := apply(model, anatomy, plan)).state_dict(keep_vars=True)
    assert all(kept[key] is value for key, value in model.state_dict(keep_vars=True).items())
    assert applied.config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("name", params)
def test_an_exception_inside_a_simulation_leaves_no_trace(name: str) -> None:
    model, anatomy = dense(name)
    before = snapshot(model)
    plan = Plan.of([], keeps=narrowings(anatomy, 1, pick=lambda _, inner: inner.least))
    with pytest.raises(RuntimeError, match="on purpose"), simulate(model, anatomy, plan):
        assert snapshot(model) != before
        raise RuntimeError("on purpose")
    assert snapshot(model) == before


@pytest.mark.parametrize("name", params)
def test_what_a_plain_config_can_say_the_stock_class_builds(name: str) -> None:
    """Every kind of unit that has a config value, everywhere the same number: shapes, and what modules keep of them."""
    model, anatomy = dense(name)
    for kind in ("neuron", "group", "expert"):
        keeps = [
            keep(address, inner, range(number))
            for address, (inner,) in anatomy.inner.items()
            if inner.kind == kind and inner.keys and inner.parts == 1
            for number in [max(inner.count // 2, inner.least)]
            if not inner.divides or inner.divides % (inner.keys[0][1] * number) == 0
        ]
        plan = Plan.of([], target=Target.UNIFORM, keeps=keeps)
        applied = apply(model, anatomy, plan)
        config = type(model.config).from_dict(applied.config.to_dict())
        rebuilt = on_meta(type(model), config)
        assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {
            k: v.shape for k, v in applied.state_dict().items()
        }
        assert numbers(rebuilt) == numbers(applied)


def test_a_plain_config_says_what_is_left_where_the_first_block_goes_too() -> None:
    model, anatomy = dense("llama")
    keeps = [
        keep(a, inner, range(24)) for a, (inner,) in anatomy.inner.items() if inner.kind == "neuron" and a.block > 0
    ]
    applied = apply(model, anatomy, Plan.of(["decoder.0"], target=Target.UNIFORM, keeps=keeps))
    assert (applied.config.num_hidden_layers, applied.config.intermediate_size) == (4, 24)


def numbers(model: nn.Module) -> dict[str, int]:
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) is int and name != "intermediate_dim"
    }


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (8, 8), (8, 1), (6, 3)])
def test_ratios_of_heads(heads: int, kv_heads: int) -> None:
    sizes = {"hidden_size": 24, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 7}
    family = _decoder("Qwen3ForCausalLM", blocks=3, head_dim=sizes.pop("head_dim") + 1, **sizes)
    model = family.build()
    anatomy = discover(model)
    ratio = heads // kv_heads
    (inner,) = anatomy.inner[Address("decoder", 1, "attention")]
    assert inner.count == kv_heads and ("num_attention_heads", ratio) in inner.keys
    edit = keep(Address("decoder", 1, "attention"), inner, range(kv_heads - 1, kv_heads))
    applied = apply(model, anatomy, Plan.of([], keeps=[edit]))
    attention: Any = applied.get_submodule("model.layers.1.self_attn")
    assert attention.q_proj.out_features == ratio * attention.k_proj.out_features == ratio * 8
    inputs = family.inputs(model, 2, None)
    with masked(model, anatomy, [edit]):
        torch.testing.assert_close(applied(**inputs)[0], model(**inputs)[0], atol=2e-5, rtol=1e-5)


def mixture(block: Any, hidden: Tensor, experts: list[int], picked: int) -> Tensor:
    """A mixture with top-k weights that add up to one, written out: only these experts can be chosen."""
    out = torch.zeros_like(hidden)
    for row, token in enumerate(hidden):
        scores = (block.gate.weight[experts] @ token).softmax(0)
        best = scores.topk(picked)
        for weight, place in zip(best.values / best.values.sum(), best.indices, strict=True):
            gate, up = (block.experts.gate_up_proj[experts[place]] @ token).chunk(2)
            out[row] += weight * (block.experts.down_proj[experts[place]] @ (torch.nn.functional.silu(gate) * up))
    return out


def test_a_mixture_without_some_experts() -> None:
    model, anatomy = dense("mixtral")
    unit = Address("decoder", 2, "mlp")
    applied = apply(model, anatomy, Plan.of([], keeps=[Keep(unit=unit, inner="expert", indices=(0, 2, 3))]))
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    path = anatomy.sublayer(unit).module
    expected = mixture(model.get_submodule(path), hidden, [0, 2, 3], 2)
    torch.testing.assert_close(applied.get_submodule(path)(hidden[None])[0], expected, atol=1e-5, rtol=1e-5)


def test_a_router_that_picks_within_groups() -> None:
    """Without two of four experts of each group: as if the others' bias kept them from being chosen."""
    family = _decoder(
        "DeepseekV3ForCausalLM", blocks=2, num_key_value_heads=4, first_k_dense_replace=1, moe_intermediate_size=20,
        n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2, q_lora_rank=None, kv_lora_rank=12,
        qk_rope_head_dim=6, qk_nope_head_dim=10, v_head_dim=9,
    )  # fmt: skip
    model = family.build()
    anatomy = discover(model)
    unit = Address("decoder", 1, "mlp")
    (inner,) = anatomy.inner[unit]
    assert (inner.least, inner.parts) == (4, 2)
    plan = Plan.of([], keeps=[Keep(unit=unit, inner="expert", indices=(0, 3, 5, 6))])
    applied = apply(model, anatomy, plan)
    inputs = family.inputs(model, 2, None)
    model.get_submodule("model.layers.1.mlp.gate").e_score_correction_bias[[1, 2, 4, 7]] = -1e4  # type: ignore[index]
    torch.testing.assert_close(applied(**inputs)[0], model(**inputs)[0], atol=1e-5, rtol=1e-5)
