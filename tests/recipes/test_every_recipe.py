"""Every recipe that comes along, carried out on a small model. A new one joins by being in the folder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import VOCABULARY, build
from torch.nn.functional import cosine_similarity

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.measure.cost import CostModel
from billhook.measure.trace import trace
from billhook.plan.address import Address
from billhook.plan.budget import Budget
from billhook.plan.check import check, units
from billhook.plan.plan import Plan
from billhook.recipes.catalogue import load, names
from billhook.recipes.costs import costs_of
from billhook.recipes.find import Choice, find
from billhook.recipes.schema import Recipe
from billhook.search import Problem, pose

IDS = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(2))
WINDOWS = Windows.of(IDS, "noise")


def half(recipe: Recipe, model: Any) -> Problem:
    """About half of what the recipe may drop has to go; a quarter where each one goes into a neighbour that stays."""
    share = 0.25 if recipe.act == "flatten" else 0.5
    outline = discover(model).outline
    costs = CostModel(outline)
    droppable = sum(costs.saving(unit)["params"] for unit in units(outline, recipe.unit))
    budget = Budget.parse(f"params={1 - share * droppable / costs.dense['params']:.3f}")
    return pose(outline, budget, recipe.unit, stack="decoder")


def carried_out(recipe: Recipe, problem: Problem, model: Any, place: Path) -> Choice:
    opened: Any = SimpleNamespace(model=model, anatomy=discover(model))
    seen = trace(model, opened.anatomy, WINDOWS, ("block", "sublayer", "angular"))
    return find(recipe, opened, problem, WINDOWS, seen, seed=0, place=place, progress=None)


DROPPING = [
    n for n in names() if not (load(n).wide or load(n).returns) and load(n).unit not in ("weight", "linear", "channel")
]


@pytest.mark.parametrize("name", DROPPING)
def test_the_budget_is_met_by_units_of_the_recipes_kind_and_again(name: str, tmp_path: Path) -> None:
    recipe, model = load(name), build("llama")
    problem = half(recipe, model)
    found = carried_out(recipe, problem, model, tmp_path / "one")
    plan = Plan.of(found.found.drops).model_copy(update={"schedule": found.schedule})
    check(plan, problem.outline)
    costs = {kind: cost.compressed for kind, cost in costs_of(plan, problem.outline).items()}
    assert problem.met(costs)
    assert found.found.steps[-1].realised["params"] < 1
    kinds = {unit.sublayer or "block" for unit in found.found.drops}
    allowed = {"block", "attention", "mlp"} if recipe.unit == "sublayer" else {recipe.unit}
    assert kinds <= allowed  # sublayers that make up a block are found as one
    assert carried_out(recipe, problem, build("llama"), tmp_path / "two") == found


@pytest.mark.parametrize("name", ["attention-drop", "mlp-drop", "joint-drop"])
def test_llm_drop_takes_the_sublayers_of_highest_similarity(name: str, tmp_path: Path) -> None:
    """cos(x, x + f(x)) by plain hooks; the paper counts units alike, so their order is that of the cosines alone."""
    model = build("llama")
    seen: dict[Address, torch.Tensor] = {}

    def watch(block: int, kind: str, norm: Any, branch: Any) -> None:
        norm.register_forward_hook(lambda m, args, output: seen.update({Address("decoder", block, kind): args[0]}))

        def after(module: Any, args: Any, output: Any) -> None:
            x = seen[Address("decoder", block, kind)]
            written = output[0] if isinstance(output, tuple) else output
            seen[Address("decoder", block, kind)] = cosine_similarity(x, x + written, dim=-1).mean()

        branch.register_forward_hook(after)

    for index, layer in enumerate(model.model.layers):
        watch(index, "attention", layer.input_layernorm, layer.self_attn)
        watch(index, "mlp", layer.post_attention_layernorm, layer.mlp)
    with torch.no_grad():
        model(input_ids=IDS)
    similarity = {unit: float(value) for unit, value in seen.items()}

    recipe, fresh = load(name), build("llama")
    found = carried_out(recipe, half(recipe, fresh), fresh, tmp_path)
    dropped = [Address.parse(step.units[0]) for step in found.found.steps if step.units]
    wanted = [u for u in similarity if recipe.unit in ("sublayer", u.sublayer)]
    assert dropped == sorted(wanted, key=lambda u: -similarity[u])[: len(dropped)]
    assert [step.score for step in found.found.steps if step.units] == pytest.approx(
        [1 - similarity[unit] for unit in dropped], abs=1e-5
    )
