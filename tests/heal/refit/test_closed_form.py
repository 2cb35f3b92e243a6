"""Healing on tiny models: exact where it can be, honest where it cannot, the same model before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy, discover
from billhook.data import Windows
from billhook.export.huggingface import save
from billhook.heal import Healing, closed_form, healed
from billhook.heal.refit.places import places
from billhook.heal.refit.stepping import Stepper
from billhook.measure.batches import batches_of
from billhook.measure.patch import hooked
from billhook.plan.address import Address
from billhook.plan.check import normalise, units
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.surgery import apply, simulate
from billhook.surgery.reopen import load

WALKED = [name for name in FAMILIES if name != "gemma4"]
DECODERS = [name for name in WALKED if list(FAMILIES[name].stacks) == ["decoder"]]
NORMED = {"gemma2", "gemma3", "olmo2", "opt_post_norm", "bloom_post_norm", "bert", "bert_classifier", "roberta", "bart"}
NORMED |= {"gemma3_image"}


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def windows(rows: int = 16, length: int = 12, seed: int = 5) -> Windows:
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))
    return Windows.of(ids, "test")


def inner(anatomy: Anatomy, stack: str) -> list[Address]:
    """Two sublayers in the middle, neither in the first block."""
    found = [u for u in units(anatomy.outline, "sublayer") if u.stack == stack and u.block in (1, 2)]
    return [found[0], found[-1]]


def inputs_of(name: str, model: PreTrainedModel) -> Any:
    return [FAMILIES[name].inputs(model, 4, None), FAMILIES[name].inputs(model, 4, None)]


def last_stream(model: nn.Module, anatomy: Anatomy, stack: str, inputs: dict[str, Tensor]) -> Tensor:
    """Of whatever blocks the model has now."""
    seen = []

    def keep(block, args, kwargs, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    with hooked([(model.get_submodule(anatomy.stack(stack).path)[-1], keep)]):
        model(**inputs)
    return seen[0]


@pytest.mark.parametrize(("name", "stack"), [(name, stack) for name in WALKED for stack in FAMILIES[name].stacks])
def test_place_by_place_is_the_models_own_forward(name: str, stack: str) -> None:
    """Dense, and with every second sublayer gone."""
    model = build(name)
    anatomy = discover(model)
    inputs = FAMILIES[name].inputs(model, 2, None)
    for drops in (frozenset(), normalise(inner(anatomy, stack), anatomy.outline)):
        stepper = Stepper(model, anatomy.stack(stack), list(batches_of([inputs], model)))
        stream = stepper.enter(0)
        for place in places(anatomy.stack(stack)):
            stream = stepper.run(0, place, stream, place.silent(drops))
        with simulate(model, anatomy, drops):
            torch.testing.assert_close(stream, last_stream(model, anatomy, stack, inputs), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", WALKED)
def test_every_write_is_accounted_for(name: str) -> None:
    """Each write linear after the first gap is refitted, refused or left alone with a reason; a norm behind it in the
    branch is refitted or refused then."""
    model = build(name)
    anatomy = discover(model)
    stack = "decoder" if "decoder" in FAMILIES[name].stacks else next(iter(FAMILIES[name].stacks))
    drops = inner(anatomy, stack)
    healing = closed_form(model, anatomy, drops, inputs_of(name, model))
    kept = [s for b in anatomy.stack(stack).blocks for s in b.sublayers if s.address not in drops]
    later = [s for s in kept if s.address.block > drops[0].block]
    after = {write for s in later for write in s.writes}
    tried = [refit.weight for refit in healing.refits]
    assert after <= set(tried) | set(healing.left_alone)
    assert len(tried) == len(set(tried)) and not set(tried) & set(healing.left_alone)
    assert bool(after & set(tried)) == (name not in NORMED)
    norms = {f"{s.output}.weight" for s in kept if s.output in s.norms} if name in NORMED else set()
    assert {norm for s in later for norm in norms if norm == f"{s.output}.weight"} <= set(tried)
    assert set(tried) <= after | norms | {name for s in kept for name in (*s.reads, *s.writes)}
    grafted = {name for s in kept for name in s.reads if str(s.address) in {graft.into for graft in healing.grafts}}
    if not healing.refused:
        changed = {n.removesuffix("bias") + "weight" if n.endswith("bias") else n for n in healing.tensors}
        assert changed - grafted == {refit.weight for refit in healing.refits if refit.taken} - grafted
    for refit in healing.refits:
        assert refit.after < refit.before if refit.taken else refit.after == refit.before


@pytest.mark.parametrize("name", DECODERS)
def test_simulated_applied_and_reloaded_agree(name: str, tmp_path: Path) -> None:
    model = build(name)
    anatomy = discover(model)
    plan = Plan.of(inner(anatomy, "decoder"), target="remote")
    healing = closed_form(model, anatomy, plan, inputs_of(name, model))
    inputs = FAMILIES[name].inputs(model, 3, "left")
    with simulate(model, anatomy, plan):
        cut = model(**inputs).logits
    with healed(model, healing):
        with simulate(model, anatomy, plan):
            expected = model(**inputs).logits
        applied = apply(model, anatomy, plan)
    assert bool((expected - cut).abs().max() > 1e-3) == bool(healing.taken), "healing shows in the logits"
    assert torch.equal(applied(**inputs).logits, expected)
    save(applied, anatomy, plan, tmp_path)
    reloaded = load(tmp_path).model
    torch.testing.assert_close(reloaded(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["llama", "gpt2", "granite", "stablelm_parallel", "dinov2", "vit", "modernbert", "gemma2", "gemma3", "olmo2"],
)
def test_the_reported_error_is_that_of_the_healed_model(name: str) -> None:
    """The last refit states the error of the final stream on the rows that were held back."""
    model = build(name)
    anatomy = discover(model)
    stack = list(FAMILIES[name].stacks)[-1]
    drops = inner(anatomy, stack)
    inputs = FAMILIES[name].inputs(model, 8, None)
    healing = closed_form(model, anatomy, drops, [inputs])
    dense = last_stream(model, anatomy, stack, inputs)[-1]
    with healed(model, healing), simulate(model, anatomy, drops):
        now = last_stream(model, anatomy, stack, inputs)[-1]
    error = ((now - dense).square().sum(-1) / dense.square().sum(-1)).mean().item()
    assert healing.taken
    assert healing.refits[-1].after == pytest.approx(error, rel=1e-3)


def test_a_mixture_that_balances_its_experts_heals_as_any_other() -> None:
    """Its forward adds up the routers' choices, of which there are none where only the head runs."""
    model = build("mixtral")
    anatomy = discover(model)
    drops = inner(anatomy, "decoder")
    plain = closed_form(model, anatomy, drops, windows())
    model.config.output_router_logits = True
    balanced = closed_form(model, anatomy, drops, windows())
    assert plain.tensors and all(torch.equal(plain.tensors[name], balanced.tensors[name]) for name in plain.tensors)


@pytest.mark.parametrize("name", ["llama", "llama_bias", "gpt2", "granite", "falcon", "gpt_neox_sequential"])
def test_a_linear_sublayer_comes_back_whole(name: str) -> None:
    """The dropped MLP writes a linear function of what the attention before it has at its write linear, so the refit
    of that attention writes both, and the stream is the dense one again."""
    model = build(name)
    anatomy = discover(model)
    attention, mlp = anatomy.stacks[0].blocks[2].sublayers
    healing, dense, now = _with_linear_mlp(model, anatomy, attention.writes[0], mlp)
    assert healing.refits[0].weight == attention.writes[0]
    assert healing.refits[0].after < 1e-6 < 1e-2 < healing.refits[0].before
    torch.testing.assert_close(now, dense, atol=2e-3, rtol=2e-3)


def _with_linear_mlp(model: PreTrainedModel, anatomy: Anatomy, write: str, mlp: Any) -> tuple[Healing, Tensor, Tensor]:
    linear = model.get_submodule(write.removesuffix(".weight"))
    seen: list[Tensor] = []
    linear.register_forward_hook(lambda module, args, output: seen.append(args[0]))  # all text is one batch
    module = model.get_submodule(mlp.module)
    width = linear.weight.shape[0 if type(linear).__name__ == "Conv1D" else 1]
    other = torch.randn(width, anatomy.outline.stacks[0].hidden_size, generator=torch.Generator().manual_seed(9))

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (seen[-1] @ other / width**0.5).reshape(hidden_states.shape)

    module.forward = forward
    drops = [mlp.address]
    text = windows(40)
    healing = closed_form(model, anatomy, drops, text)
    inputs = {"input_ids": windows(3, seed=6).ids}
    dense = last_stream(model, anatomy, "decoder", inputs)
    with healed(model, healing), simulate(model, anatomy, drops):
        now = last_stream(model, anatomy, "decoder", inputs)
    return healing, dense, now


@pytest.mark.parametrize("name", ["llama_bias", "gpt2", "qwen3_moe"])
def test_batches_do_not_matter(name: str) -> None:
    """Streamed in any portions: the same sums, the same weights."""
    model = build(name)
    anatomy = discover(model)
    drops = inner(anatomy, "decoder")
    ids = windows(16).ids
    whole = closed_form(model, anatomy, drops, [{"input_ids": ids}])
    parts = closed_form(model, anatomy, drops, [{"input_ids": part} for part in ids.split([1, 5, 7, 3])])
    assert [(r.weight, r.penalty) for r in parts.refits] == [(r.weight, r.penalty) for r in whole.refits]
    assert whole.taken
    for key, tensor in whole.tensors.items():
        torch.testing.assert_close(parts.tensors[key], tensor, atol=1e-2, rtol=1e-2)


@settings(max_examples=10)
@given(data=st.data())
def test_the_held_back_error_never_rises(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["llama", "gpt2", "cohere", "qwen3_moe", "gemma2", "olmo2"]))
    model = build(name)
    anatomy = discover(model)
    candidates = [u for u in units(anatomy.outline, "sublayer") if u.block]
    drops = data.draw(st.lists(st.sampled_from(candidates), min_size=1, max_size=4, unique=True))
    rows = data.draw(st.integers(2, 12))
    healing = closed_form(model, anatomy, drops, windows(rows, seed=data.draw(st.integers(0, 99))))
    for refit in healing.refits:
        assert refit.after < refit.before if refit.taken else refit.after == refit.before


def test_the_model_is_left_as_it_was_and_undo_brings_back_every_bit() -> None:
    model = build("llama_bias").train()
    anatomy = discover(model)
    before = {key: (id(p), p.clone()) for key, p in model.named_parameters()}
    dense = model.eval()(input_ids=windows().ids).logits
    model.train()
    healing = closed_form(model, anatomy, inner(anatomy, "decoder"), windows())
    assert all(module.training for module in model.modules())
    with pytest.raises(RuntimeError, match="on purpose"), healed(model, healing):
        changed = {key for key, p in model.named_parameters() if not torch.equal(p, before[key][1])}
        raise RuntimeError("on purpose")
    assert changed == set(healing.tensors) != set()
    assert all(id(p) == before[key][0] and torch.equal(p, before[key][1]) for key, p in model.named_parameters())
    assert torch.equal(model.eval()(input_ids=windows().ids).logits, dense)


def test_an_applied_model_keeps_what_it_shares() -> None:
    model = build("llama")
    anatomy = discover(model)
    plan = Plan.of(inner(anatomy, "decoder"))
    healing = closed_form(model, anatomy, plan, windows())
    with healed(model, healing):
        applied = apply(model, anatomy, plan)
    shared = {id(p) for p in model.parameters()}
    new = [key for key, p in applied.named_parameters() if id(p) not in shared]
    assert len(new) == len(healing.tensors), "only the healed weights take memory of their own"


def test_nothing_dropped_is_nothing_to_heal() -> None:
    model = build("llama")
    healing = closed_form(model, discover(model), [], windows())
    assert (healing.tensors, healing.refits) == ({}, ())


def test_only_what_comes_after_the_first_gap_is_walked_twice() -> None:
    """Five blocks; the last sublayer before the gap is refitted too, so its block is walked again;
    the last block is walked for its reads as well."""
    model = build("llama")
    anatomy = discover(model)
    healing = closed_form(model, anatomy, [Address("decoder", 3)], windows())
    assert healing.tokens == 16 * 12
    assert healing.work == (5 + 2 + 1) * healing.tokens
    places = list(dict.fromkeys(tuple(refit.weight.split(".")[2:4]) for refit in healing.refits))
    assert places == [("2", "mlp"), ("4", "self_attn"), ("4", "mlp")]
    assert len(healing.refits) == 1 + (3 + 1) + (2 + 1), "before the gap nothing reads anything new"


def test_memory_does_not_grow_with_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most four streams of a batch are alive at once: dense, healed, the one that is being made, and what an MLP in
    the gap was given."""
    import gc

    from billhook.heal.refit.walk import Walk

    most = 0
    count = Walk._count

    def counting(self: Walk, *args: Any) -> None:
        nonlocal most
        gc.collect()
        shape = (16, 12, 36)
        streams = {t.data_ptr() for t in gc.get_objects() if type(t) is Tensor and t.shape == shape}
        most = max(most, len(streams))
        count(self, *args)

    monkeypatch.setattr(Walk, "_count", counting)
    model = build("llama")
    closed_form(model, discover(model), [Address("decoder", 1, "mlp")], windows())
    assert 2 <= most <= 4


@pytest.mark.parametrize(
    ("weight", "message"),
    [("model.layers.0.mlp.down_proj.weight", r"out of decoder\.0"), ("model.embed_tokens.weight", r"into decoder\.0")],
)
def test_damage_is_named(weight: str, message: str) -> None:
    model = build("llama")
    model.get_parameter(weight)[:] = float("nan")
    with pytest.raises(InputError, match=message):
        closed_form(model, discover(model), [Address("decoder", 2)], windows())


def test_one_window_is_too_few() -> None:
    model = build("llama")
    with pytest.raises(InputError, match="at least two windows"):
        closed_form(model, discover(model), [Address("decoder", 2)], windows(1))


def test_one_stack_at_a_time() -> None:
    model = build("clip")
    drops = [Address("text", 1, "mlp"), Address("vision", 1, "mlp")]
    with pytest.raises(InputError, match="text and vision"):
        closed_form(model, discover(model), drops, inputs_of("clip", model))


def test_shared_keys_and_values_are_refused() -> None:
    model = build("gemma4")
    anatomy = discover(model)
    with pytest.raises(InputError, match="keys and values"):
        closed_form(model, anatomy, [Address("decoder", 0, "mlp")], windows())


def test_no_fit_sees_what_is_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other windows in the last eighth: what is fitted on stays the same, and what judges it does not."""
    seen: list[Any] = []
    monkeypatch.setattr("billhook.heal.refit.peers.solve", lambda fit, held, *_: seen.append((fit, held)))
    model = build("llama")
    anatomy = discover(model)
    ids = windows(16).ids
    for text in (ids, torch.cat([ids[:14], windows(2, seed=9).ids])):
        closed_form(model, anatomy, [Address("decoder", 3, "mlp")], Windows.of(text, "test"))
    for (fit, held), (again, other) in zip(seen[: len(seen) // 2], seen[len(seen) // 2 :], strict=True):
        assert (fit.tokens, held.tokens) == (14 * 12, 2 * 12)
        torch.testing.assert_close(again.inputs, fit.inputs)
        assert not torch.allclose(other.inputs, held.inputs)


def test_what_donors_were_given_is_held_no_longer_than_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    from billhook.heal.refit.walk import Walk

    kept: list[int] = []
    writes = Walk._writes

    def counting(self: Walk, *args: Any) -> Any:
        kept.append(len(self._donated))
        return writes(self, *args)

    monkeypatch.setattr(Walk, "_writes", counting)
    model = build("llama")
    closed_form(model, discover(model), [Address("decoder", 1), Address("decoder", 2)], windows())
    assert kept == [1, 1, 0, 0, 0], "mlp 0, then attention and mlp of 3 and 4; the last one is lent to mlp 3"
