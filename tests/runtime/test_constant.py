"""Constant schedules: the model under one is the model that was cut, looped or reordered, for every family."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from families import build
from running import GENERATING, equal, generate, ready, state
from transformers import StaticCache

from billhook.anatomy import discover
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.schedule import Schedule
from billhook.runtime.catalogue import policy_of
from billhook.surgery import apply, simulate


@pytest.mark.parametrize("name", GENERATING)
def test_skipping_is_what_cutting_is_and_leaves_nothing_behind(name: str) -> None:
    model, anatomy, prompt = ready(name)
    before = state(model)
    units = ["decoder.1.attention", "decoder.2.mlp"]
    units += [u for u in ("decoder.0.attention", "decoder.3") if u not in anatomy.outline.pinned]
    cut = apply(model, anatomy, Plan.of(units))
    with policy_of(f"static-skip:units={'+'.join(units)}").attach(model, anatomy) as attached:
        under = generate(model, prompt)
        assert state(model) != before
    assert equal(under, generate(cut, prompt))
    assert attached.counts.share_run(next(iter(Plan.of(["decoder.2.mlp"]).drops))) == 0
    assert state(model) == before


@pytest.mark.parametrize("name", [name for name in GENERATING if name != "gemma4"])
def test_a_loop_has_cache_slots_of_its_own(name: str) -> None:
    """Cached generation through blocks that are visited twice or out of order is what it is without a cache."""
    model, anatomy, prompt = ready(name)
    before, plain = state(model), generate(model, prompt)
    rest = range(4, len(anatomy.stack("decoder").blocks))
    with policy_of(f"chain:blocks={'+'.join(map(str, [0, 1, 1, 3, 2, *rest]))}").attach(model, anatomy):
        cached, fresh = generate(model, prompt), generate(model, prompt, use_cache=False)
    assert torch.equal(cached[0], fresh[0])
    torch.testing.assert_close(cached[1], fresh[1], atol=2e-3, rtol=2e-3)
    assert not torch.equal(cached[1], plain[1])
    assert state(model) == before
    assert equal(generate(model, prompt), plain)


def test_a_block_visited_twice_does_what_it_does_twice() -> None:
    model = build("llama")
    anatomy = discover(model)
    ids = torch.tensor([[5, 9, 33, 12]])
    layer, once = model.model.layers[2], []
    handle = layer.register_forward_hook(
        lambda module, args, kwargs, out: once.append((args, kwargs, out)), with_kwargs=True
    )
    with torch.no_grad():
        model(ids, use_cache=False)
        (_, kwargs, out) = once[0]
        twice = layer(out, **kwargs)
    handle.remove()
    seen = []
    handle = model.model.layers[3].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with policy_of("chain:blocks=0-2+2+3-4").attach(model, anatomy), torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    assert torch.equal(seen[0], twice)


def test_gemma4_keeps_its_blocks_in_place() -> None:
    model, anatomy, _ = ready("gemma4")
    before = state(model)
    with pytest.raises(InputError, match="cannot be moved or repeated"):
        policy_of("chain:blocks=0-6+6").attach(model, anatomy)
    assert state(model) == before


def test_even_skip_keeps_the_ends_and_as_many_as_the_target_says() -> None:
    policy = policy_of("even-skip:speedup=1.5")
    kept = policy.kept(30)  # type: ignore[attr-defined]
    assert (kept[0], kept[-1], len(kept)) == (0, 29, 20)
    assert {b - a for a, b in pairwise(kept)} == {1, 2}
    assert policy_of("even-skip:speedup=1.25").kept(5) == [0, 1, 3, 4]  # type: ignore[attr-defined]  # 4/3, 8/3
    assert policy_of("even-skip:speedup=1.3").kept(4) == [0, 1, 2, 3]  # type: ignore[attr-defined]  # ceil
    assert policy_of("even-skip:speedup=1.4").kept(4) == [0, 2, 3]  # type: ignore[attr-defined]  # 3/2 goes up
    with pytest.raises(InputError, match="fewer than the first and the last"):
        policy_of("even-skip:speedup=20").attach(build("llama"))


def test_a_plan_with_a_schedule_is_simulated_and_applied_as_drops() -> None:
    model, anatomy, prompt = ready("qwen2")
    plan = Plan(schedule=Schedule.skipping(["decoder.3", "decoder.1.mlp"]))
    with policy_of("static-skip:units=decoder.3+decoder.1.mlp").attach(model, anatomy):
        under = generate(model, prompt)
    assert equal(under, generate(apply(model, anatomy, plan), prompt))
    with simulate(model, anatomy, plan):
        assert equal(under, generate(model, prompt))
    turned = Plan(schedule=Schedule.chain([1, 0]))
    with policy_of("chain:blocks=1+0").attach(model, anatomy):
        under = generate(model, prompt)
    with simulate(model, anatomy, turned):
        assert equal(under, generate(model, prompt))


SCHEDULES = (
    "static-skip:units=decoder.1+decoder.2.attention+decoder.3.mlp",
    "even-skip:speedup=1.5",
    "chain:blocks=0+2+2",
)


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("phi3", SCHEDULES[0]),  # queries, keys and values in one linear
        ("gpt_neox", SCHEDULES[1]),  # parallel
        ("mixtral", SCHEDULES[2]),
        ("gemma2", SCHEDULES[0]),  # norms around every sublayer, a window in every other block
        ("bloom", SCHEDULES[2]),
        ("olmo2", SCHEDULES[2]),  # norms behind sublayers
    ],
)
def test_it_compiles_whole(name: str, policy: str) -> None:
    """No family here fails to compile without a policy; one schedule each, since compiling takes seconds."""
    model, anatomy, _ = ready(name)
    ids = torch.tensor([[5, 9, 33, 12]])
    torch.compiler.reset()
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
        with policy_of(policy).attach(model, anatomy):
            under = model(input_ids=ids, use_cache=False).logits
            compiled = torch.compile(model, backend="eager", fullgraph=True)(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(compiled, under)
    assert not torch.allclose(compiled, plain, atol=1e-2)


@pytest.mark.parametrize("policy", [SCHEDULES[0], SCHEDULES[2]])
def test_compiled_it_decodes_with_a_static_cache(policy: str) -> None:
    """Prompt and step are a graph each: no further step compiles again."""
    model, anatomy, _ = ready("llama")
    prompt = torch.tensor([[5, 9, 33, 12]])
    torch.compiler.reset()
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    with policy_of(policy).attach(model, anatomy), torch.no_grad():
        ids, logits = generate(model, {"input_ids": prompt})
        assert torch.equal(generate(model, {"input_ids": prompt}, cache_implementation="static")[0], ids)
        cache = StaticCache(config=model.config, max_cache_len=16)
        step, given = torch.compile(model, backend=backend, fullgraph=True), prompt
        for expected, token in zip(logits, ids[0, prompt.shape[1] :], strict=True):
            found = step(input_ids=given, past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            given = token[None, None]
    assert graphs == 2
