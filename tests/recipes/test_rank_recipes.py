"""Every recipe of low rank on small models, and all the way to a checkpoint that is healed again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import VOCABULARY, build
from safetensors.torch import load_file

import billhook
from billhook.anatomy import discover
from billhook.data import Windows
from billhook.measure.cost import CostModel
from billhook.plan.budget import Budget
from billhook.plan.check import check
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.target import Target
from billhook.recipes import heal as heal_walk
from billhook.recipes.apply import apply
from billhook.recipes.catalogue import load, names
from billhook.recipes.compare import compare
from billhook.recipes.find import Choice, find, pose_for
from billhook.recipes.heal import applied, differing
from billhook.recipes.opened import opened
from billhook.recipes.schema import Recipe

APART = [name for name in names() if load(name).unit == "linear"]
WINDOWS = Windows.of(torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(2)), "noise")


def carried_out(recipe: Recipe, model: Any, place: Path) -> Choice:
    opened: Any = SimpleNamespace(model=model, anatomy=discover(model))
    problem = pose_for(recipe, opened.anatomy.outline, Budget.parse("params=0.8"), Target.REMOTE)
    seen: Any = None
    return find(recipe, opened, problem, WINDOWS, seen, seed=0, place=place, progress=None)


@pytest.mark.parametrize("name", APART)
def test_the_budget_is_met_and_again(name: str, tmp_path: Path) -> None:
    recipe, model = load(name), build("llama")
    outline = discover(model).outline
    found = carried_out(recipe, model, tmp_path)
    plan = found.plan(Target.REMOTE)
    check(plan, outline)
    costs = CostModel(outline)
    share = costs.of([], factors=plan.factors)["params"] / costs.dense["params"]
    assert 0.77 < share <= 0.8
    assert found.record.steps[-1].realised["params"] == pytest.approx(share)
    assert carried_out(recipe, build("llama"), tmp_path).plan(Target.REMOTE).dumps() == plan.dumps()


def test_ranks_go_where_the_energy_is_spread(tmp_path: Path) -> None:
    """A linear that puts out one direction only loses all others first."""
    model = build("llama")
    with torch.no_grad():
        weight = model.model.layers[2].mlp.up_proj.weight
        weight.copy_(weight[:, :1] @ weight[:1] + 1e-3 * weight)
    ranks = {(edit.unit.block, edit.linear): edit.rank for edit in carried_out(load("low-rank"), model, tmp_path).bases}
    assert ranks[2, "mlp.up_proj"] == min(ranks.values()) <= 2


def test_all_the_way(tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record, card, page and checkpoint; the plan carried out on disk; the result healed again, and told apart."""
    monkeypatch.setattr("billhook.recipes.texts.HEALING_TOKENS", 4096)
    out = tmp_path / "out"
    run = billhook.compress(tiny_lm, budget="params=0.7", out=out, recipe="low-rank", max_new_tokens=2)
    assert run.plan.factors and run.realised["params"] <= 0.7
    assert run.healing is not None and any(refit.taken for refit in run.healing.refits)
    cut, healed = (run.healing.unhealed[0], run.evidence[0])
    assert healed.perplexity_ratio.value < cut.perplexity_ratio.value
    small, dense = opened(out, dtype=None, device="cpu", trust_remote_code=False), discover
    costs = CostModel(dense(small.model).outline).dense
    assert costs["params"] == run.costs["params"].compressed
    card, page = ((out / name).read_text(encoding="utf-8") for name in ("README.md", "report.html"))
    assert "in two parts, of rank" in card and "- low-rank" in card and "depth-pruning" not in card
    assert "in two parts, of rank" in page and "% left" in page
    content = json.loads((out / "billhook.json").read_text())
    assert content["plan"]["arrays"].startswith("sha256:") and (out / "billhook.arrays").is_file()

    unhealed = tmp_path / "unhealed"
    apply(tiny_lm, out, out=unhealed)
    told, named = load_file(out / "model.safetensors"), load_file(unhealed / "model.safetensors")
    assert told.keys() == named.keys()
    assert all(torch.equal(named[key], told[key]) for key in named if ".expand." in key and "bias" not in key)
    assert any(not torch.equal(named[key], told[key]) for key in named if ".reduce." in key)

    model = opened(tiny_lm, dtype=None, device="cpu", trust_remote_code=False)
    plan = Plan.read(out)
    again = applied(model, plan, differing(small.model, model, plan, out))
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, small.model.state_dict()[name], atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="linears in two parts, which lora cannot train"):
        heal_walk.heal(out, out=tmp_path / "lora", method="lora")
    with pytest.raises(InputError, match="linears in two parts, which --heal lora cannot train"):
        billhook.compress(tiny_lm, budget="params=0.7", out=tmp_path / "no", recipe="svd", heal="lora")


def test_side_by_side(tiny_lm: Path, tmp_path: Path) -> None:
    recipes = ["svd", "svd-llm", "maestro"]
    result = compare(tiny_lm, budgets="params=0.7", out=tmp_path / "out", recipes=recipes)
    entries = {entry.recipe: entry for entry in result.entries}
    assert all(entries[name].factors and not entries[name].refused for name in recipes)
    assert entries["maestro"].damage < entries["svd"].damage
    assert entries["svd-llm"].damage < entries["svd"].damage
    assert "of rank" in (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")


def test_a_basis_that_does_not_fit_is_refused(tiny_lm: Path) -> None:
    model = opened(tiny_lm, dtype=None, device="cpu", trust_remote_code=False)
    (edit, basis), *_ = carried_out(load("svd"), model.model, Path()).bases.items()
    for wrong, message in ((basis[:, 1:], "is not"), (np.full_like(basis, np.nan), "finite numbers")):
        with pytest.raises(InputError, match=message):
            billhook.simulate(model.model, model.anatomy, Plan().factorised({edit: wrong})).__enter__()
