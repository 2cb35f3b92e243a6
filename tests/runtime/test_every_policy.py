"""Every policy on every family that generates: nothing changes where nothing is left out, rows decide for themselves,
and detaching restores the model exactly."""

from __future__ import annotations

from typing import Any

import accelerate
import pytest
import torch
from families import FAMILIES
from running import GENERATING, NEW, drawn_experts, equal, generate, ready, state
from transformers import GenerationConfig, TextStreamer

from billhook.anatomy import Anatomy
from billhook.plan.errors import InputError
from billhook.plan.schedule import Schedule, Site
from billhook.runtime.catalogue import POLICIES, policy_of
from billhook.runtime.fewer_neurons import neurons_of
from billhook.runtime.first_router import FirstRouter
from billhook.runtime.in_turns import Scheduled
from billhook.runtime.mixture_of_depths import MixtureOfDepths
from billhook.runtime.policy import Policy
from billhook.runtime.voids import Voids


def router(anatomy: Anatomy, *, threshold: float) -> Policy:
    """Routers that are drawn: about half of the rows leave out a block."""
    stack = anatomy.outline.stack("decoder")
    weight = torch.randn(len(stack.blocks), stack.hidden_size, generator=torch.Generator().manual_seed(4))
    return FirstRouter(threshold=threshold).with_tensors({"w": weight, "b": torch.zeros(len(weight))})


def depths(anatomy: Anatomy, *, ratio: float) -> Policy:
    """Routers that are drawn, for all blocks but the first: about half of the tokens step around a block."""
    stack = anatomy.outline.stack("decoder")
    weight = torch.randn(len(stack.blocks), stack.hidden_size, generator=torch.Generator().manual_seed(4))
    levels = torch.linspace(-6, 6, 11).expand(len(weight), 11)
    policy = MixtureOfDepths(ratio=ratio, blocks=f"1-{len(weight) - 1}", decay=False)
    return policy.with_tensors({"w": weight, "levels": levels})


def quiet(anatomy: Anatomy) -> list[Policy]:
    """Of every policy a setting that leaves out nothing, its machinery running where it has any."""
    blocks = len(anatomy.stack("decoder").blocks)
    texts = ("static-skip", "even-skip:speedup=1", "chain", "ffn-skip:threshold=1,warmup=0", "lora-drop:period=1")
    policies = [policy_of(text) for text in (*texts, "similarity-exit:decoder=1,encoder=1")]
    turns = Schedule(tables=((), ()))
    if may_have_gaps(anatomy):
        policies.append(policy_of("lora-drop:period=1,blocks=1-2,writes=refresh"))
    return [
        *policies,
        Voids(threshold=0, prompt=(0.0,) * blocks, generation=(0.0,) * blocks),
        Scheduled(schedule=turns),
        router(anatomy, threshold=0),
        depths(anatomy, ratio=1),
    ]


def loud(anatomy: Anatomy) -> list[Policy]:
    """Of every policy that decides while the model runs a setting that leaves out a lot."""
    blocks = len(anatomy.stack("decoder").blocks)
    void = [0.5 if i == 2 else 1.0 for i in range(blocks)]
    table = (Site(unit="decoder.2.attention", verb="skip"), Site(unit="decoder.1.mlp", verb="skip"))
    return [
        policy_of("ffn-skip:threshold=0.4,warmup=0,first=1,last=0,span=1"),
        policy_of("similarity-exit:decoder=0.5,encoder=0.8,first=1"),
        policy_of("lora-drop:period=2,blocks=1-2"),
        Voids(threshold=0.9, prompt=tuple(void), generation=(1.0, 0.5, 1.0, *[1.0] * (blocks - 3))),
        Scheduled(schedule=Schedule(tables=(table, ()))),
        router(anatomy, threshold=0.5),
        depths(anatomy, ratio=0.5),
        *([drawn_experts(anatomy, keep=0.5)] if neurons_of(anatomy) else []),
        *([policy_of("expert-skip:text=0.4")] if has_experts(anatomy) else []),
        *([GAPS] if may_have_gaps(anatomy) else []),
    ]


GAPS = policy_of("lora-drop:period=2,blocks=1-2,writes=refresh")


def may_have_gaps(anatomy: Anatomy) -> bool:
    """Whether transformers lets the cache of one block lack what another's has: a decoder without windows."""
    outline = anatomy.outline
    widths = [b.sublayers["attention"].window for b in outline.stack("decoder").blocks if "attention" in b.sublayers]
    return len(anatomy.stacks) == 1 and not any(widths)


def has_experts(anatomy: Anatomy) -> bool:
    return any(inner.kind == "expert" for units in anatomy.inner.values() for inner in units)


@pytest.mark.parametrize("name", GENERATING)
def test_what_leaves_out_nothing_changes_nothing(name: str) -> None:
    model, anatomy, prompt = ready(name)
    before, plain = state(model), generate(model, prompt)
    policies = quiet(anatomy)
    # self-speculation always leaves the text as it is: test_speculate; kv-share is for decoders: test_kv_share
    assert {policy.name for policy in policies} | {"expert-skip", "neuron-experts", "kv-share"} == set(POLICIES) - {
        "self-speculation"
    }
    if has_experts(anatomy):
        policies.append(policy_of("expert-skip:text=1e-9"))  # its comparison runs, and leaves out nothing
    if neurons_of(anatomy):
        policies.append(drawn_experts(anatomy, keep=1.0))  # its router runs
    for policy in policies:
        with policy.attach(model, anatomy) as attached:
            assert equal(generate(model, prompt), plain), policy
        assert not sum(attached.counts.skipped.values()) + sum(attached.counts.left_out.values())
        assert state(model) == before


@pytest.mark.parametrize("name", GENERATING)
def test_a_row_does_not_see_its_neighbours(name: str) -> None:
    """The padded row of a batch comes out as it does alone, whatever the other one leaves out."""
    family = FAMILIES[name]
    model, anatomy, prompt = ready(name)
    before = state(model)
    # BART counts positions from the padding, and an image has its place in the text
    alone = {k: v[1:] if not family.pads or v.ndim != 2 else v[1:, 2:] for k, v in prompt.items()}
    exact = not name.startswith("bart")
    may_agree = ("ffn-skip", "similarity-exit", "first-router")
    for policy in loud(anatomy):
        with policy.attach(model, anatomy) as attached:
            ids, logits = generate(model, prompt)
            own_ids, own = generate(model, alone)
        left_out = sum(attached.counts.skipped.values()) + sum(attached.counts.left_out.values())
        assert left_out > 0 or policy.name in may_agree
        if exact:
            assert torch.equal(ids[1, -NEW:], own_ids[0, -NEW:]), policy
            torch.testing.assert_close(logits[:, 1], own[:, 0], atol=2e-3, rtol=2e-3)
        assert state(model) == before


@pytest.mark.parametrize(
    "how", [{"num_beams": 3}, {"do_sample": True}, {"cache_implementation": "static"}, {"streamer": 1}]
)
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_the_users_own_generate_just_works(name: str, how: dict[str, Any], tiny_tokenizer: Any) -> None:
    model, anatomy, prompt = ready(name)
    if "streamer" in how:
        prompt = {k: v[:1] for k, v in prompt.items()}
        how = {"streamer": TextStreamer(tiny_tokenizer)}
    remember = ("lora-drop", "scheduled", "first-router") if "num_beams" in how else ("lora-drop", "scheduled")
    for policy in [p for p in loud(anatomy) if p.name not in remember]:
        with policy.attach(model, anatomy):
            torch.manual_seed(3)
            ids, _ = generate(model, prompt, **how)
        assert ids.shape[1] == prompt["input_ids"].shape[1] + NEW


@pytest.mark.parametrize("name", GENERATING)
def test_a_static_cache_and_a_dynamic_one_agree(name: str) -> None:
    model, anatomy, prompt = ready(name)
    try:
        plain = generate(model, prompt, cache_implementation="static")
    except Exception as error:  # Falcon's alibi: it unpacks the mask, which has four dimensions with a static cache
        if name != "falcon_alibi":
            raise
        pytest.skip(f"transformers cannot run this family with a static cache, without a policy: {error}")
    different = 0
    for policy in [p for p in loud(anatomy) if p != GAPS]:  # which static caches cannot have
        with policy.attach(model, anatomy):
            ids, logits = generate(model, prompt)
            static_ids, static = generate(model, prompt, cache_implementation="static")
        assert torch.equal(ids, static_ids), policy
        torch.testing.assert_close(logits, static, atol=2e-3, rtol=2e-3)
        different += not torch.allclose(static, plain[1], atol=2e-3, rtol=2e-3)
    assert different > 1  # what is left out is heard, with a static cache too


def test_an_exception_passes_and_the_model_is_restored() -> None:
    model, anatomy, prompt = ready("qwen3")
    before, plain = state(model), generate(model, prompt)
    for policy in [*loud(anatomy), policy_of("chain:blocks=0+0+3-4")]:
        with pytest.raises(KeyboardInterrupt), policy.attach(model, anatomy):
            generate(model, prompt)
            handle = model.model.layers[2].mlp.down_proj.register_forward_pre_hook(_interrupt)
            handle_last = model.model.layers[3].self_attn.v_proj.register_forward_pre_hook(_interrupt)
            try:
                generate(model, prompt)
            finally:
                handle.remove()
                handle_last.remove()
        assert state(model) == before
    assert equal(generate(model, prompt), plain)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_asking_for_hidden_states_meanwhile_leaves_no_hook() -> None:
    model, anatomy, prompt = ready("llama")
    before = state(model)
    with policy_of("chain:blocks=0-1+1+4").attach(model, anatomy), torch.no_grad():
        assert len(model(**prompt, output_hidden_states=True).hidden_states) == 5
    assert state(model) == before
    with torch.no_grad():
        assert len(model(**prompt, output_hidden_states=True).hidden_states) == 6


def test_one_policy_at_a_time() -> None:
    model, anatomy, _ = ready("llama")
    with policy_of("ffn-skip").attach(model, anatomy) as attached:
        with pytest.raises(InputError, match="attached to this model already"):
            policy_of("chain").attach(model, anatomy)
        attached.detach()
        policy_of("chain").attach(model, anatomy).detach()


def test_a_forward_that_a_library_put_there_comes_back() -> None:
    model, anatomy, prompt = ready("llama")
    mlp = model.model.layers[1].mlp
    original = mlp.forward
    calls = []

    def own(x: Any) -> Any:
        calls.append(1)
        return original(x)

    vars(mlp)["forward"] = own
    with loud(anatomy)[4].attach(model, anatomy):
        generate(model, prompt)
    assert calls
    assert vars(mlp)["forward"] is own


def test_weights_may_be_moved_about_meanwhile() -> None:
    """accelerate keeps them elsewhere and fetches a module's for its call."""
    model, anatomy, prompt = ready("llama")
    wanted = []
    for policy in loud(anatomy):
        with policy.attach(model, anatomy):
            wanted.append(generate(model, prompt))
    moved = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for policy, found in zip(loud(anatomy), wanted, strict=True):
        if policy.name == "neuron-experts":
            before = state(moved)
            with pytest.raises(InputError, match="experts are copies of neurons"):
                policy.attach(moved, anatomy)
            assert state(moved) == before
            continue
        with policy.attach(moved, anatomy):
            assert equal(generate(moved, prompt), found), policy


def test_beam_search_is_refused_where_rows_are_remembered() -> None:
    model, anatomy, prompt = ready("llama")
    with policy_of("lora-drop:period=2").attach(model, anatomy), pytest.raises(InputError, match="beam search"):
        model.generate(**prompt, num_beams=2, max_new_tokens=2)
    assert "generate" not in vars(model)


def test_beams_are_refused_however_they_are_asked_for_and_an_own_generate_comes_back() -> None:
    model, anatomy, prompt = ready("llama")
    own = model.generate
    vars(model)["generate"] = own
    with policy_of("lora-drop:period=2").attach(model, anatomy), pytest.raises(InputError, match="beam search"):
        model.generate(prompt["input_ids"], GenerationConfig(num_beams=2, max_new_tokens=2))
    assert vars(model)["generate"] is own
