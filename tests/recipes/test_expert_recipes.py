"""Experts as units of recipes: what routers say, what is unknown, and one recipe all the way."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, build

import billhook
from billhook.anatomy import discover
from billhook.data import Windows
from billhook.measure.routing import routing
from billhook.measure.width import WidthTrace, units_of
from billhook.plan.budget import Budget
from billhook.plan.check import check
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.target import Target
from billhook.recipes.catalogue import load
from billhook.recipes.schema import Recipe
from billhook.scores import named
from billhook.search.blind_widths import even_widths, random_widths
from billhook.search.width import allocate, pose_width
from billhook.surgery import apply

MIXTURES = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"]
WINDOWS = Windows.of(torch.randint(3, 90, (4, 10), generator=torch.Generator().manual_seed(3)), "test")


def experts_of(anatomy):
    return units_of(anatomy, "expert", [address for address, _ in anatomy.outline.sublayers()])


@pytest.mark.parametrize("name", MIXTURES)
def test_what_is_counted_is_what_the_experts_were_given(name: str) -> None:
    """Against the arguments of the experts themselves, padding left out."""
    model = build(name)
    anatomy = discover(model)
    units = experts_of(anatomy)
    inputs = FAMILIES[name].inputs(model, 3, "left")
    given: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(f"{anatomy.sublayer(a).module}.experts").register_forward_pre_hook(
            lambda module, args, a=a: given.update({str(a): args[1]})
        )
        for a in units
    ]
    found = routing(model, anatomy, units, [inputs])
    for handle in handles:
        handle.remove()
    real = inputs["attention_mask"].bool().reshape(-1)
    assert found.keys() == units.keys() and not real.all()
    for a, seen in found.items():
        picked = given[str(a)][real].reshape(-1)
        assert seen.count == int(real.sum())
        assert seen.slots.tolist() == torch.bincount(picked, minlength=units[a].count).tolist()
        assert seen.likeness.diagonal() == pytest.approx(1)
    halves = [{key: value[rows] for key, value in inputs.items()} for rows in (slice(0, 1), slice(1, 3))]
    again = routing(model, anatomy, units, halves)
    assert all(again[a].slots.tolist() == seen.slots.tolist() for a, seen in found.items())


def test_an_expert_that_was_never_picked_is_unknown_and_stays() -> None:
    """Expert 2 of block 1 is never picked: it stays although every other one was, and in its mixture alone."""
    model = build("mixtral")
    with torch.no_grad():
        router = model.get_submodule("model.layers.1.mlp.gate")
        router.weight[2] = 0
        router.weight[3] = router.weight[0]  # two of the others are always ahead of zero
        router.weight[1] = -router.weight[0]
        router.weight[[0, 1, 3]] *= 50
        router.weight[3] *= 1.01
    anatomy = discover(model)
    units = experts_of(anatomy)
    trace = WidthTrace.of(model, units, routing=routing(model, anatomy, units, WINDOWS))
    scores = named("routing-frequency")(trace, anatomy)
    unknown = {(a.block, i) for a, s in scores.items() for i, value in enumerate(s.tolist()) if math.isinf(value)}
    assert unknown == set() or all(trace.routing[a].slots[i] == 0 for a in scores for b, i in unknown if a.block == b)
    forced = {a: s.clone() for a, s in scores.items()}
    address = next(a for a in forced if a.block == 1)
    forced[address][2] = math.inf
    for target in (Target.UNIFORM, Target.REMOTE):
        problem = pose_width(anatomy.outline, Budget.parse("params=0.8"), "expert", target, stack="decoder")
        for allocation in ("uniform", *(["global", "standardised"] if target is Target.REMOTE else [])):
            keeps, _ = allocate(problem, forced, allocation)
            check(Plan.of([], target, keeps), anatomy.outline)
            assert all(2 in keep.indices for keep in keeps if keep.unit == address)
            assert any(2 not in keep.indices for keep in keeps)
    forced[address][:] = math.inf
    with pytest.raises(InputError, match="the others stay"):
        allocate(pose_width(anatomy.outline, Budget.parse("params=0.8"), "expert", Target.UNIFORM), forced, "uniform")


@pytest.mark.parametrize("name", MIXTURES)
def test_baselines_meet_the_budget(name: str) -> None:
    anatomy = discover(build(name))
    budget = Budget.parse("params=0.8" if name != "deepseek_v3" else "params=0.99")
    for target in (Target.UNIFORM, Target.REMOTE):
        try:
            problem = pose_width(anatomy.outline, budget, "expert", target, stack="decoder")
        except InputError as error:
            assert name == "deepseek_v3", error  # its router needs two of each two
            continue
        for keeps, costs in (even_widths(problem), random_widths(problem, 0)):
            check(Plan.of([], target, keeps), anatomy.outline)
            assert problem.met(costs)
        assert random_widths(problem, 0) == random_widths(problem, 0) != random_widths(problem, 2)


def test_evenly_spaced_in_each_run() -> None:
    model = build("mixtral")
    problem = pose_width(discover(model).outline, Budget.parse("params=0.75"), "expert", Target.UNIFORM)
    keeps, _ = even_widths(problem)
    assert {keep.indices for keep in keeps} == {(1, 3)}  # of 0 to 3


def test_experts_have_scores_of_their_own_and_targets() -> None:
    words = load("expert-frequency").model_dump()
    with pytest.raises(ValueError, match="is not one of neurons"):
        Recipe.model_validate({**words, "unit": "neuron"})
    with pytest.raises(ValueError, match="have those of their router"):
        Recipe.model_validate({**words, "score": {"word": "magnitude"}})
    outline = discover(build("mixtral")).outline
    with pytest.raises(InputError, match="target deci"):
        pose_width(outline, Budget.parse("params=0.8"), "expert", Target.DECI)
    with pytest.raises(InputError, match="no expert"):
        pose_width(discover(build("llama")).outline, Budget.parse("params=0.8"), "expert", Target.UNIFORM)


def test_unequal_mixtures_make_no_balancing_loss() -> None:
    """It takes the logits of all routers at once; where these differ in width the model must run all the same."""
    model = build("mixtral")
    model.config.output_router_logits = True
    anatomy = discover(model)
    problem = pose_width(anatomy.outline, Budget.parse("params=0.9"), "expert", Target.REMOTE)
    keeps, _ = random_widths(problem)
    assert len({len(keep.indices) for keep in keeps} | {4}) > 1
    inputs = FAMILIES["mixtral"].inputs(model, 1, None)
    with billhook.simulate(model, anatomy, Plan.of([], keeps=keeps)):
        assert not model.config.output_router_logits
        model(**inputs)
    assert model.config.output_router_logits
    assert not apply(model, anatomy, Plan.of([], keeps=keeps)).config.output_router_logits


@pytest.mark.parametrize("recipe", ["expert-frequency", "m-smoe"])
def test_all_the_way(recipe: str, tiny_mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ordinary checkpoint that plain transformers loads, with its proof."""
    monkeypatch.setattr("billhook.recipes.texts.HEALING_TOKENS", 4096)
    out = tmp_path / "out"
    run = billhook.compress(tiny_mixture, budget="params=0.65", out=out, recipe=recipe, max_new_tokens=2)
    assert {len(keep.indices) for keep in run.plan.keeps} == {2}
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "An ordinary checkpoint" in card and "experts of blocks" in card
    assert "10 experts" in (out / "report.html").read_text(encoding="utf-8")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(loaded).__name__ == "MixtralForCausalLM" and loaded.config.num_local_experts == 2
    ids = torch.tensor([[5, 9, 33, 12]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, billhook.load(out, dtype="float32").model(ids).logits)
