"""Recipes of hidden channels: scores by their formulas, the budget, what stays, and the walk from end to end."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import VOCABULARY, build
from pydantic import ValidationError

import billhook
from billhook.anatomy import discover
from billhook.data import Windows
from billhook.measure.cost import CostModel
from billhook.measure.stream import stream_trace
from billhook.plan.budget import Budget
from billhook.plan.check import check
from billhook.plan.comparison import Entry
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.target import Target
from billhook.recipes import heal as heal_walk
from billhook.recipes.catalogue import load
from billhook.recipes.compare import compare
from billhook.recipes.find import find, pose_for
from billhook.recipes.heal import applied, differing
from billhook.recipes.opened import opened
from billhook.recipes.schema import Recipe
from billhook.report.cuts import narrower
from billhook.report.drawing import left_of
from billhook.scores import named
from billhook.search.channels import even_channels, most_important, pose_channels, random_channels

RECIPES = ("hidden-channels", "minitron-channels", "random-channels", "evenly-spaced-channels")
IDS = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(2))
WINDOWS = Windows.of(IDS, "noise")


@pytest.fixture(scope="module")
def thing() -> Any:
    model = build("qwen3")
    return SimpleNamespace(model=model, anatomy=discover(model))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_meets_its_budget_with_as_many_channels_as_it_may(name: str, thing: Any, tmp_path: Path) -> None:
    recipe, outline = load(name), thing.anatomy.outline
    assert recipe.aim is Target.UNIFORM
    problem = pose_for(recipe, outline, Budget.parse("params=0.8"), recipe.aim)
    found = find(recipe, thing, problem, WINDOWS, None, seed=0, place=tmp_path, progress=None)  # type: ignore[arg-type]
    again = find(recipe, thing, problem, WINDOWS, None, seed=0, place=tmp_path, progress=None)  # type: ignore[arg-type]
    assert found == again
    plan = found.plan(recipe.aim)
    check(plan, outline)
    (edit,) = plan.channels
    costs = CostModel(outline)
    assert costs.of((), channels=plan.channels)["params"] <= 0.8 * costs.dense["params"]
    more = edit.model_copy(update={"indices": tuple(range(len(edit.indices) + 1))})
    assert costs.of((), channels=[more])["params"] > 0.8 * costs.dense["params"]
    assert found.record.steps[-1].realised["params"] == pytest.approx(len(edit.indices) / 32, abs=0.02)


def test_scores_are_what_they_say(thing: Any) -> None:
    """By plain hooks on one block and the head, in float64."""
    model, seen = build("qwen3"), {}

    def keep(name: str) -> Any:
        return lambda module, args, output: seen.update({name: args[0].flatten(0, 1).double()})

    layer = model.model.layers[2]
    layer.self_attn.q_proj.register_forward_hook(keep("attention"))
    layer.mlp.up_proj.register_forward_hook(keep("mlp"))
    layer.input_layernorm.register_forward_hook(keep("stream"))
    model.lm_head.register_forward_hook(keep("head"))
    with torch.no_grad():
        model(IDS)
    trace = stream_trace(thing.model, thing.anatomy, WINDOWS)
    given, carried, reads = trace.given["decoder"], trace.carried["decoder"], trace.reads["decoder"]
    assert len(given) == len(reads) == 11 and len(carried) == 5
    for place, name in ((4, "attention"), (5, "mlp"), (10, "head")):
        torch.testing.assert_close(given[place].rms, seen[name].square().mean(0).sqrt(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(carried[2].rms, seen["stream"].square().mean(0).sqrt(), atol=1e-5, rtol=1e-5)
    activation = named("stream-activation").function(trace, thing.anatomy)["decoder"]
    torch.testing.assert_close(activation, torch.stack([g.rms for g in given]).sum(0))
    total = torch.zeros(32, dtype=torch.float64)
    for weights, z in zip(reads, given, strict=True):
        energy = sum(w.double().square().sum(0) for w in weights) * z.rms**2
        total += energy / energy.sum() / 11
    for x in carried:
        total += x.rms**2 / (x.rms**2).sum() / 5
    torch.testing.assert_close(named("stream-reads").function(trace, thing.anatomy)["decoder"], total)
    assert [w.shape[0] for w in reads[5]] == [48, 48] and [w.shape[0] for w in reads[4]] == [40, 20, 20]


def test_choices_that_look_at_nothing(thing: Any) -> None:
    problem = pose_channels(thing.anatomy.outline, Budget.parse("params=0.8"), stack="decoder")
    evenly = even_channels(problem).indices
    assert len(evenly) == problem.left and {b - a for a, b in pairwise(evenly)} == {1, 2}
    assert random_channels(problem, 0) == random_channels(problem, 0) != random_channels(problem, 1)
    scores = torch.arange(32.0)
    scores[[3, 4]] = 100.0
    assert most_important(problem, scores).indices == (3, 4, *range(34 - problem.left, 32))
    with pytest.raises(InputError, match="finite numbers"):
        most_important(problem, scores * float("nan"))


def test_multiples() -> None:
    outline = discover(build("llama_bias")).outline  # whose config takes multiples of its 4 heads
    assert pose_channels(outline, Budget.parse("params=0.9"), stack="decoder").left == 28
    assert pose_channels(outline, Budget.parse("params=0.9"), stack="decoder", multiple_of=6).left == 24
    mixture = discover(build("mixtral")).outline
    assert pose_channels(mixture, Budget.parse("params=0.9"), stack="decoder").left == 24


@pytest.mark.parametrize(
    ("family", "budget", "target", "reason"),
    [
        ("qwen3", "until=cliff", Target.ANY, "width has none"),
        ("qwen3", "params=0.01", Target.ANY, "cannot be met"),
        ("qwen3", "kv_bytes=0.9", Target.ANY, "kv_bytes is still 1.000 of dense"),
        ("llama", "params=0.8", Target.DECI, "target deci"),
        ("gpt2", "params=0.8", Target.ANY, "width of its heads follows"),
    ],
)
def test_impossible_tasks(family: str, budget: str, target: Target, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        pose_channels(discover(build(family)).outline, Budget.parse(budget), target, stack="decoder")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"score": None}, "channels need a score, and no other"),
        ({"score": {"word": "wanda-structured"}}, "not one of channels"),
        ({"unit": "neuron"}, "not one of neurons|go with the choices"),
        ({"heal": "bias"}, "in closed form, or not"),
        ({"act": "average"}, "in closed form, or not"),
        ({"choice": {"word": "one-shot"}}, "hidden channels go with"),
    ],
)
def test_recipes_that_make_no_sense(changes: dict[str, Any], reason: str) -> None:
    whole = load("hidden-channels").model_dump(mode="json")
    with pytest.raises(ValidationError, match=reason):
        Recipe.model_validate(whole | changes)


def test_a_comparison_says_what_is_left(thing: Any) -> None:
    outline = thing.anatomy.outline
    problem = pose_channels(outline, Budget.parse("params=0.8"), stack="decoder")
    edit = even_channels(problem)
    assert narrower((), (), (), [edit]) == [f"decoder: {problem.left} hidden channels kept"]
    left = left_of(outline, (), (), (), [edit])
    assert left.keys() == dict(outline.sublayers()).keys()
    assert all(abs(value - 100 * problem.left / 32) < 2 for value in left.values())
    entry = Entry(recipe="x", seed=0, baseline=False, asked="params=0.8", target=Target.UNIFORM, channels=(edit,))
    assert entry.plan.channels == (edit,) and Entry.model_validate_json(entry.model_dump_json()) == entry


def test_all_the_way(tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record, card, page and an ordinary checkpoint; the result told apart from the dense model again."""
    monkeypatch.setattr("billhook.recipes.texts.HEALING_TOKENS", 4096)
    out = tmp_path / "out"
    run = billhook.compress(tiny_lm, budget="params=0.7", out=out, recipe="hidden-channels", max_new_tokens=2)
    (edit,) = run.plan.channels
    assert run.realised["params"] <= 0.7 and run.healing is not None and not run.healing.refused
    config = json.loads((out / "config.json").read_text())
    assert config["hidden_size"] == len(edit.indices) and "auto_map" not in config
    small = opened(out, dtype=None, device="cpu", trust_remote_code=False)
    assert CostModel(small.anatomy.outline).dense["params"] == run.costs["params"].compressed
    card, page = ((out / name).read_text(encoding="utf-8") for name in ("README.md", "report.html"))
    for text in (card, page):
        assert f"{len(edit.indices):,} of" in text and "in all that reads or writes the stream" in text
    assert "- width-pruning" in card and "depth-pruning" not in card and "An ordinary checkpoint" in card
    model = opened(tiny_lm, dtype=None, device="cpu", trust_remote_code=False)
    plan = Plan.read(out)
    again = applied(model, plan, differing(small.model, model, plan, out))
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, small.model.state_dict()[name], atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="hidden channels, which lora knows nothing of"):
        heal_walk.heal(out, out=tmp_path / "lora", method="lora")


def test_what_knows_nothing_of_hidden_channels_is_refused(tiny_lm: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hidden channels, which --heal lora knows nothing of"):
        billhook.compress(tiny_lm, budget="params=0.7", out=tmp_path / "no", recipe="hidden-channels", heal="lora")


def test_side_by_side(tiny_lm: Path, tmp_path: Path) -> None:
    result = compare(tiny_lm, budgets="params=0.7", out=tmp_path / "out", recipes=["hidden-channels"])
    (entry,) = (entry for entry in result.entries if entry.recipe == "hidden-channels")
    assert entry.channels and not entry.refused
    assert "hidden channels kept" in (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
