"""Acts that combine instead of dropping, on every family: the same by hand, in memory and saved, or refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCABULARY, build, params
from surgery.live import generate, inputs_of, logits, stock_load

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.evaluate.causal import require_causal
from billhook.export.huggingface import save
from billhook.heal import UNTOUCHED, Healing, refill, restore, scale_updates
from billhook.heal.combining.side_by_side import pairs
from billhook.measure.features import Features
from billhook.models import building
from billhook.plan.address import Address
from billhook.plan.budget import Budget
from billhook.plan.errors import InputError
from billhook.plan.plan import Factorise, Keep, Plan
from billhook.plan.schedule import Schedule
from billhook.plan.target import Target
from billhook.recipes.catalogue import load
from billhook.recipes.find import pose_for
from billhook.recipes.heal import applied, new_weights
from billhook.recipes.settled import require_fitting, way_of
from billhook.surgery import simulate

IDS = torch.randint(3, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(4)).repeat(8, 1)
TEXT = Windows.of(IDS, "the same again and again")  # what is learned of it holds for what is held back
BUDGET = Budget.parse("params=0.97")
Made = tuple[Plan, Healing]


@cache
def dense(name: str) -> Any:
    """As ``opened`` gives it."""
    model = build(name)
    return SimpleNamespace(
        model=model, anatomy=discover(model), stored=torch.float32, loaded=SimpleNamespace(source=name)
    )


@cache
def causal(name: str) -> bool:
    try:
        require_causal(dense(name).model, "this")
    except InputError:
        return False
    return True


def stack_of(name: str) -> Any:
    """The decoder; of a model without one, its first stack."""
    anatomy = dense(name).anatomy
    return next((s for s in anatomy.stacks if s.name == "decoder"), anatomy.stacks[0])


def tuned_from(name: str) -> Any:
    """The base of a model: the same with all of its weights a little off."""
    base = build(name)
    draw = torch.Generator().manual_seed(3)
    for parameter in base.parameters():
        parameter.add_(0.3 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=draw))
    return base


def by_recipe(recipe: str, plan_of: Callable[[str], Plan]) -> Callable[[str], Made]:
    """Where compress takes the model: all that it asks before it measures, then the new weights."""

    def make(name: str) -> Made:
        model, chosen = dense(name), load(recipe)
        way = way_of(chosen, None)
        if causal(name):
            pose_for(chosen, model.anatomy.outline, BUDGET, chosen.aim)
            require_fitting(chosen, way, chosen.aim, BUDGET, None, model)
        plan = plan_of(name)
        text: Any = TEXT if causal(name) or way == "gains" else 6 * [FAMILIES[name].inputs(model.model, 4, None)]
        return plan, new_weights(model, plan, way, text, None) if way != "none" else UNTOUCHED

    return make


def without_a_block(name: str) -> Plan:
    return Plan.of([Address(stack_of(name).name, 1)])


def without_one_of_a_pair(name: str) -> Plan:
    model, stack = dense(name), stack_of(name)
    return Plan.of([Address(stack.name, pairs(model.model, model.anatomy, stack)[-1])])


def with_a_shared_block(name: str) -> Plan:
    stack = stack_of(name)
    order = [0, 1, 1, *range(3, len(stack.blocks))]
    return Plan.of([], Target.REMOTE).model_copy(update={"schedule": Schedule.chain(order, stack.name)})


def units(name: str, kind: str) -> list[tuple[Address, Any]]:
    inner = dense(name).anatomy.inner
    return [(a, u) for a, found in inner.items() for u in found if u.kind == kind and a.stack == stack_of(name).name]


def with_fewer_experts(name: str) -> Plan:
    keeps = [Keep(unit=a, inner="expert", indices=tuple(range(0, u.count, 2))) for a, u in units(name, "expert")]
    return Plan.of([], keeps=keeps)


def with_experts_apart(name: str) -> Plan:
    plan, sublayers = with_fewer_experts(name), dict(dense(name).anatomy.outline.sublayers())
    edits = [
        Factorise(unit=keep.unit, linear=path, rank=max(mixture.useful - 1, 1))
        for keep in plan.keeps
        for path, mixture in sublayers[keep.unit].mixtures.items()
    ]
    return plan.model_copy(update={"edits": (*plan.edits, *edits), "target": Target.REMOTE})


def with_fewer_neurons(name: str) -> Plan:
    weights = dict(dense(name).model.named_parameters(remove_duplicate=False))
    keeps = []
    for number, (address, inner) in enumerate(units(name, "neuron")):
        gone = {merge.gone for merge in Features(inner, weights).merges(3 + number)}
        kept = tuple(sorted(set(range(inner.count)) - gone))
        keeps.append(Keep(unit=address, inner="neuron", indices=kept))
    return Plan.of([], Target.REMOTE, keeps=keeps)


def put_back(name: str) -> Made:
    model, stack = dense(name), stack_of(name)
    blocks = [Address(stack.name, 1), Address(stack.name, 2)]
    return Plan(target=Target.UNIFORM), restore(model.model, model.anatomy, tuned_from(name), blocks)


def scaled(name: str) -> Made:
    model = dense(name)
    return Plan(target=Target.UNIFORM), scale_updates(model.model, model.anatomy, tuned_from(name))


def refilled(name: str) -> Made:
    model = dense(name)
    return Plan(target=Target.UNIFORM), refill(model.model, model.anatomy, Address(stack_of(name).name, 2))


ACTS: dict[str, Callable[[str], Made]] = {
    "restore": put_back,
    "scale": scaled,
    "refill": refilled,
    "average": by_recipe("checkfree", without_a_block),
    "fuse": by_recipe("fusegpt", without_a_block),
    "gains": by_recipe("branch-gains", without_a_block),
    "flatten": by_recipe("flatten-gpt", without_one_of_a_pair),
    "share": by_recipe("foldgpt", with_a_shared_block),
    "merge": by_recipe("m-smoe", with_fewer_experts),
    "condense": by_recipe("mc-smoe", with_experts_apart),
    "features": by_recipe("feature-merging", with_fewer_neurons),
}


NO_BLOCK = "no block of .* can be dropped for target .*: the model's per-layer embedding is one tensor"
NORMS = "is not written to the stream as it is, or has no single norm before it"
ENCODERS = ("bert", "bert_classifier", "roberta", "modernbert", "vit", "dinov2", "clip")
PAIRS = ("t5", "t5_gated", "bart", "whisper")
NORMED = ("gemma2", "gemma3", "olmo2", "gemma3_image")
MERGED = ("mixtral", "qwen3_moe", "olmoe")
#: Act -> reason -> families. What is not here is carried out.
REFUSED: dict[str, dict[str, tuple[str, ...]]] = {
    "refill": {"its neighbours are not built like it": ("qwen3_moe", "gemma4")},
    "average": {NO_BLOCK: ("gemma4",)},
    "fuse": {NO_BLOCK: ("gemma4",)},
    "gains": {
        NO_BLOCK: ("gemma4",),
        "norms stand behind all": NORMED,
        "model has no decoder": ENCODERS,
        "gates are trained on next tokens": PAIRS,
    },
    "flatten": {
        NO_BLOCK: ("gemma4",),
        NORMS: (*NORMED, "opt_post_norm", "bert", "bert_classifier", "roberta", "dinov2", "bart"),
        "all units of each read its own self_attn.q_norm.weight": ("qwen3",),
        "q_layernorm.norms.0.weight is no part of it that is known": ("stablelm_parallel",),
        "has a bias, and .* has none to take it up": ("stablelm", "falcon", "whisper"),
        "every block's heads read one tensor of position biases": ("falcon_alibi", "bloom", "bloom_post_norm"),
        "it holds the relative position bias that every later block reads": ("t5", "t5_gated"),
        "its units share a router": ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3"),
    },
    "share": {
        "keeps its weight transposed": ("gpt2",),
        "is stored and no parameter": ("deepseek_v3",),
        NO_BLOCK: ("gemma4",),
    },
    "features": {"no neuron of stack decoder": ("mixtral", "olmoe")},
}
for act in ("merge", "condense"):
    others = tuple(name for name in params if name not in (*MERGED, "deepseek_v3", *ENCODERS, *PAIRS))
    REFUSED[act] = {
        "no expert of stack decoder of this .* model can go for target (uniform|remote)$": others,
        "all 8 must stay": ("deepseek_v3",),  # two of each group that its router scores
        "takes away experts of one stack": (*ENCODERS, *PAIRS),
    }


def refusal(act: str, name: str) -> str:
    return next((why for why, names in REFUSED.get(act, {}).items() if name in names), "")


@pytest.mark.parametrize("name", params)
@pytest.mark.parametrize("act", ACTS)
def test_done_or_refused(act: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "billhook.heal.combining.gains.divergences", lambda *_: (1.0, 0.5)
    )  # if they help is another test's
    if why := refusal(act, name):
        with pytest.raises(InputError, match=why):
            check(act, name, tmp_path)
    else:
        check(act, name, tmp_path)


@torch.no_grad()
def check(act: str, name: str, place: Path) -> None:
    model, anatomy = dense(name).model, dense(name).anatomy
    plan, healing = ACTS[act](name)
    inputs = inputs_of(name)[1]
    with simulate(model, anatomy, Plan() if plan.schedule else plan):
        without = logits(name, model, *inputs)
    by_hand = build(name)
    by_hand.load_state_dict(healing.tensors, strict=False)
    with simulate(by_hand, anatomy, plan):
        expected = logits(name, by_hand, *inputs)
    assert (without - expected).abs().max() > 1e-3, "the act changed nothing"
    small = applied(dense(name), plan, healing)
    torch.testing.assert_close(logits(name, small, *inputs), expected, atol=1e-5, rtol=1e-5)
    with building(place / "out", False) as folder:
        save(small, anatomy, plan, folder)
    again = stock_load(place / "out")
    torch.testing.assert_close(logits(name, again, *inputs), expected, atol=1e-5, rtol=1e-5)
    if FAMILIES[name].generates and not plan.empty:  # new weights alone do not reach the cache
        (ids, cached), (others, plain) = (generate(name, again, use_cache=cache) for cache in (True, False))
        torch.testing.assert_close(cached, plain, atol=FAMILIES[name].tolerance, rtol=0)
        assert torch.equal(ids, others)
