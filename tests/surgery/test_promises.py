"""The promises of surgery, on every family, with plans drawn at random."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, build, params
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from live import assert_cache_is_exact, drops, generate, inputs_of, logits, possible, silenced, silent, snapshot
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy, discover
from billhook.anatomy.config import resolve
from billhook.plan.address import Address
from billhook.plan.check import normalise, survivors
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.surgery import apply, simulate

GENERATING = [name for name in params if FAMILIES[name].generates]
few = settings(max_examples=6, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])


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
def test_the_empty_plan_changes_nothing(name: str) -> None:
    model, anatomy = dense(name)
    before = snapshot(model)
    expected = logits(name, model, 2, None)
    with simulate(model, anatomy, Plan()):
        assert snapshot(model) == before
    applied = apply(model, anatomy, Plan())
    assert torch.equal(logits(name, applied, 2, None), expected)
    kept = applied.state_dict(keep_vars=True)
    assert all(kept[key] is value for key, value in model.state_dict(keep_vars=True).items())
    assert applied.config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("name", params)
@given(data=st.data())
@few
def test_simulated_and_applied_agree_to_the_bit(name: str, data: st.DataObject) -> None:
    model, anatomy = dense(name)
    chosen = data.draw(drops(anatomy.outline))
    before = snapshot(model)
    applied = apply(model, anatomy, chosen)
    assert snapshot(model) == before
    with simulate(model, anatomy, chosen) as simulated:
        for batch, padding in inputs_of(name):
            expected = logits(name, simulated, batch, padding)
            assert torch.isfinite(expected).all()
            assert torch.equal(logits(name, applied, batch, padding), expected)
        if FAMILIES[name].generates:
            expected = assert_cache_is_exact(name, simulated)
            assert all(map(torch.equal, generate(name, applied, use_cache=True), expected))
    assert snapshot(model) == before


@pytest.mark.parametrize("name", params)
@given(data=st.data())
@few
def test_dropping_is_writing_nothing(name: str, data: st.DataObject) -> None:
    model, anatomy = dense(name)
    chosen = data.draw(drops(anatomy.outline))
    acting = [a for a in chosen if a.sublayer is None and anatomy.outline.stack(a.stack).blocks[a.block].rest_params]
    chosen = [a for a in chosen if a not in acting]  # of such a block something acts on the stream by itself
    if not possible(chosen, anatomy.outline):
        return
    applied = apply(model, anatomy, chosen)
    with silenced(model, silent(anatomy, chosen)):
        for batch, padding in inputs_of(name):
            expected = logits(name, model, batch, padding)
            torch.testing.assert_close(logits(name, applied, batch, padding), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", params)
def test_each_sublayer_alone(name: str) -> None:
    model, anatomy = dense(name)
    intact = logits(name, model, 2, None)
    for address, _ in anatomy.outline.sublayers():
        if not possible([address], anatomy.outline):
            continue
        with silenced(model, [anatomy.sublayer(address)]):
            expected = logits(name, model, 2, None)
        with simulate(model, anatomy, [address]):
            torch.testing.assert_close(logits(name, model, 2, None), expected, atol=1e-5, rtol=1e-5)
        assert (expected - intact).abs().max() > 1e-3, f"{address} never mattered: the test shows nothing"


@pytest.mark.parametrize("name", GENERATING)
def test_cached_generation_without_the_first_attentions(name: str) -> None:
    model, anatomy = dense(name)
    for count in (1, 2, 3):
        first = [Address("decoder", i, "attention") for i in range(count)]
        chosen = [a for a in first if possible([a], anatomy.outline)]
        assert_cache_is_exact(name, apply(model, anatomy, chosen))
    prompt = FAMILIES[name].prompt(model, 3)
    with simulate(model, anatomy, chosen):
        ids = [model.generate(**prompt, max_new_tokens=4, do_sample=False, use_cache=c) for c in (True, False)]
    assert torch.equal(*ids)


@pytest.mark.parametrize("name", GENERATING)
def test_cached_generation_with_the_last_attention_only(name: str) -> None:
    model, anatomy = dense(name)
    chosen: list[Address] = []
    for address in [a for a, _ in anatomy.outline.sublayers() if a.sublayer == "attention" and a.stack == "decoder"]:
        if possible([*chosen, address], anatomy.outline):
            chosen.append(address)
    assert_cache_is_exact(name, apply(model, anatomy, chosen))


MIXED = ("qwen2", "gemma2", "gemma3", "gemma3_image")  # windowed and full attentions, each with its own kind of cache


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("windowed", [True, False])
def test_cached_generation_without_any_attention_of_one_kind(name: str, windowed: bool) -> None:
    model, anatomy = dense(name)
    attentions = [(a, s) for a, s in anatomy.outline.sublayers() if a.stack == "decoder" and a.sublayer == "attention"]
    chosen = [a for a, s in attentions if (s.window is not None) == windowed]
    assert 0 < len(chosen) < len(attentions)
    assert_cache_is_exact(name, apply(model, anatomy, chosen))


@pytest.mark.parametrize("name", params)
def test_an_exception_inside_a_simulation_leaves_no_trace(name: str) -> None:
    model, anatomy = dense(name)
    before = snapshot(model)
    expected = logits(name, model, 2, None)
    chosen: list[Address] = []
    for address, _ in [*anatomy.outline.blocks(), *anatomy.outline.sublayers()]:
        if address.block % 2 and possible([*chosen, address], anatomy.outline):
            chosen.append(address)
    with pytest.raises(RuntimeError, match="on purpose"), simulate(model, anatomy, chosen):
        logits(name, model, 2, None)
        raise RuntimeError("on purpose")
    assert snapshot(model) == before
    assert torch.equal(logits(name, model, 2, None), expected)


@pytest.mark.parametrize("name", params)
@given(data=st.data())
@few
def test_the_predicted_parameters_are_gone(name: str, data: st.DataObject) -> None:
    model, anatomy = dense(name)
    chosen = data.draw(drops(anatomy.outline))
    applied = apply(model, anatomy, chosen)
    stacks = {stack.name: stack for stack in anatomy.outline.stacks}
    predicted = 0
    for address in normalise(chosen, anatomy.outline):
        block = stacks[address.stack].blocks[address.block]
        predicted += block.params if address.sublayer is None else block.sublayers[address.sublayer].params
    counted = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in applied.parameters())
    assert counted == predicted
    assert counted > 0 or not chosen
    shared = {id(p) for p in model.parameters()}
    assert all(id(p) in shared for p in applied.parameters()), "a weight was copied"


@pytest.mark.parametrize("name", params)
@given(data=st.data())
@few
def test_without_blocks_the_stock_class_builds_the_same_model_from_the_saved_config(
    name: str, data: st.DataObject
) -> None:
    model, anatomy = dense(name)
    chosen = data.draw(drops(anatomy.outline, ("block",)))
    applied = apply(model, anatomy, chosen)
    config = type(model.config).from_dict(applied.config.to_dict())
    with torch.random.fork_rng(devices=[]):
        rebuilt = type(model)(config).eval()
    rebuilt.load_state_dict(applied.state_dict())
    for batch, padding in inputs_of(name):
        assert torch.equal(logits(name, rebuilt, batch, padding), logits(name, applied, batch, padding))
    if FAMILIES[name].generates:
        rebuilt.generation_config = model.generation_config
        assert_cache_is_exact(name, rebuilt)
    for stack in anatomy.stacks:
        kept = survivors(chosen, anatomy.outline, stack.name)
        for counter in stack.counters:
            old, new = model, applied
            for part in counter.owner.split("."):
                old, new = getattr(old, part), getattr(new, part)
            assert getattr(new, counter.key) == len(kept)
            for key in ("layer_types", "no_rope_layers", "mlp_layer_types"):
                if isinstance(getattr(old, key, None), list):
                    assert getattr(new, key) == [getattr(old, key)[i] for i in kept]


@pytest.mark.parametrize("name", params)
def test_every_list_of_a_config_that_has_an_entry_a_block_loses_the_right_ones(name: str) -> None:
    """Also one under a name that nobody has met yet."""
    model = build(name)
    anatomy = discover(model)
    for stack in anatomy.stacks:
        for owner in {counter.owner for counter in stack.counters}:
            resolve(model, owner).per_block_of_tomorrow = [f"block {i}" for i in range(len(stack.blocks))]
        blocks = [a for a, _ in anatomy.outline.blocks() if a.stack == stack.name]
        chosen = next((a for a in blocks if possible([a], anatomy.outline)), None)
        if chosen is None:  # every block is pinned
            continue
        applied = apply(model, anatomy, [chosen])
        for owner in {counter.owner for counter in stack.counters}:
            old, new = (vars(resolve(m, owner)) for m in (model, applied))
            lists = {key for key, value in old.items() if isinstance(value, list) and len(value) == len(stack.blocks)}
            assert "per_block_of_tomorrow" in lists
            for key in lists - {"stage_names"}:  # of a backbone: one more than blocks are left
                assert new[key] == [value for i, value in enumerate(old[key]) if i != chosen.block], (owner, key)


@pytest.mark.parametrize("name", params)
def test_hidden_states_asked_for_first_inside_a_simulation(name: str) -> None:
    model, expected = build(name), build(name)
    anatomy = discover(model)
    before = snapshot(model)
    chosen = [a for a, _ in anatomy.outline.blocks() if a.block == 2 and possible([a], anatomy.outline)]
    inputs = FAMILIES[name].inputs(model, 2, None)
    with simulate(model, anatomy, chosen):
        inside = hidden_states(model(**inputs, output_hidden_states=True))
    assert snapshot(model) == before
    after = hidden_states(model(**inputs, output_hidden_states=True))
    assert len(after) == len(hidden_states(expected(**inputs, output_hidden_states=True)))
    assert (len(inside) < len(after)) == bool(chosen)


def hidden_states(output: Any) -> list[torch.Tensor]:
    """Of all stacks, one after the other."""
    parts = [
        output,
        *(part for part in output.values() if hasattr(part, "keys")),
    ]  # two towers: an output in the output
    found = [value for part in parts for key, value in part.items() if key.endswith("hidden_states")]
    return [state for states in found if isinstance(states, tuple) for state in states]


@pytest.mark.parametrize("name", params)
def test_other_models_of_the_class_are_unaffected(name: str) -> None:
    model, anatomy = dense(name)
    other = build(name)
    before = snapshot(other)
    expected = logits(name, other, 2, None)
    last = next(a for a, _ in reversed(list(anatomy.outline.sublayers())) if possible([a], anatomy.outline))
    with simulate(model, anatomy, [last]):
        assert snapshot(other) == before
        assert torch.equal(logits(name, other, 2, None), expected)
        assert not torch.equal(logits(name, model, 2, None), expected)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_a_cut_breaks_no_graph(name: str) -> None:
    """The forward of a model with stubs is one graph to the compiler, as the dense model's is."""
    model, anatomy = dense(name)
    applied = apply(model, anatomy, [Address("decoder", 0, "attention"), Address("decoder", 2, "mlp")])
    torch.compiler.reset()
    inputs = FAMILIES[name].inputs(model, 2, None)
    compiled = torch.compile(applied, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs, use_cache=False)[0], applied(**inputs, use_cache=False)[0])


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_an_impossible_plan_is_refused_before_anything_happens(name: str) -> None:
    model, anatomy = dense(name)
    before = snapshot(model)
    impossible = [Address("decoder", 99)], [a for a, _ in anatomy.outline.blocks()]
    for chosen in impossible:
        with pytest.raises(InputError), simulate(model, anatomy, chosen):
            pass
        with pytest.raises(InputError):
            apply(model, anatomy, chosen)
    assert snapshot(model) == before


@given(order=st.permutations([Address("decoder", i, kind) for i in (0, 3) for kind in ("attention", "mlp")]))
@few
def test_a_plan_is_the_same_whatever_the_order(order: list[Address]) -> None:
    assert Plan.of(order).dumps() == Plan.of(sorted(order)).dumps()
