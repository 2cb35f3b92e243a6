"""Recipes of single weights, all the way."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import VOCABULARY, build
from transformers import AutoModelForCausalLM

import billhook
from billhook.anatomy import discover
from billhook.data import Windows
from billhook.heal import closed_form, fuse
from billhook.measure.cost import cost
from billhook.measure.sums import Trace
from billhook.plan.budget import Budget
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.target import Target
from billhook.recipes.apply import apply as apply_on_disk
from billhook.recipes.catalogue import load, names
from billhook.recipes.compare import compare
from billhook.recipes.find import Choice, find, pose_for
from billhook.recipes.heal import heal
from billhook.recipes.schema import Recipe
from billhook.recipes.words import explained, needs, passes
from billhook.surgery import apply

WINDOWS = Windows.of(torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(2)), "noise")
SPARSE = [name for name in names() if load(name).unit == "weight"]


def carried_out(name: str, model: Any, place: Path, budget: str = "params=0.5") -> Choice:
    about: Any = SimpleNamespace(model=model, anatomy=discover(model))
    problem = pose_for(load(name), about.anatomy.outline, Budget.parse(budget), Target.UNIFORM)
    return find(load(name), about, problem, WINDOWS, Trace(), seed=0, place=place, progress=None)


@pytest.mark.parametrize("name", SPARSE)
def test_the_budget_is_met_and_again(name: str, tmp_path: Path) -> None:
    model = build("llama")
    found = carried_out(name, model, tmp_path)
    plan = found.plan(Target.UNIFORM)
    zeros = {edit.unit: sum(edit.zeros.values()) for edit in plan.sparsities}
    share = cost(discover(model).outline, zeros=zeros)["params"] / discover(model).outline.block_params
    assert 0.49 < share <= 0.5 and found.record.steps[-1].realised["params"] == pytest.approx(share)
    assert {edit.pattern for edit in plan.sparsities} == {load(name).choice.pattern}  # type: ignore[union-attr]
    assert (found.healing is not None) == name.startswith("sparsegpt")
    assert carried_out(name, build("llama"), tmp_path) == found
    applied = apply(model, discover(model), plan)  # counts and patterns are checked
    left = sum(int((p != 0).sum()) for n, p in applied.named_parameters() if ".layers." in n)
    assert left == round(share * discover(model).outline.block_params)


def test_the_budget_of_a_pattern_goes_below_and_not_above_it(tmp_path: Path) -> None:
    for asked, low, high in (("params=0.8", 0.49, 0.54), ("params=0.3", 0.29, 0.3)):
        found = carried_out("wanda-2-4", build("llama"), tmp_path, asked)
        assert low < found.record.steps[-1].realised["params"] <= high


def test_all_the_way(tiny_lm: Path, tmp_path: Path) -> None:
    """An ordinary checkpoint with its proof; the plan alone sets the same weights to zero again, uncorrected."""
    out = tmp_path / "out"
    run = billhook.compress(tiny_lm, budget="params=0.5", out=out, recipe="sparsegpt-2-4", max_new_tokens=1)
    assert run.plan.target == "uniform" and run.healing is not None and run.healing.method == "second-order"
    model = AutoModelForCausalLM.from_pretrained(out)
    left = sum(int((p != 0).sum()) for name, p in model.named_parameters() if ".layers." in name)
    assert left == run.costs["params"].compressed <= 0.5 * run.costs["params"].dense
    assert run.realised["size"] == run.realised["flops"] == 1
    assert Plan.read(out) == run.plan
    assert len(Plan.read(out).arrays) == sum(len(edit.zeros) for edit in run.plan.sparsities)
    page, card = ((out / file).read_text(encoding="utf-8") for file in ("report.html", "README.md"))
    assert "the share of weights that is zero" in page and " set to zero, 2:4" in page
    assert "- sparsity-2-4\n" in card and "--recipe sparsegpt-2-4" in card
    assert "Zeros are stored and multiplied with like any weight" in card

    again = apply_on_disk(tiny_lm, out, out=tmp_path / "again")
    assert again.costs["params"] == run.costs["params"] and "not healed" in again.environment
    one, two = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (out, tmp_path / "again"))
    assert all(torch.equal(one[key] == 0, two[key] == 0) for key in one)
    assert not all(torch.equal(one[key], two[key]) for key in one)

    for way in (closed_form, fuse):
        with pytest.raises(InputError, match="that the plan sets to zero"):
            way(model, discover(model), run.plan, [])
    with pytest.raises(InputError, match="that the plan sets to zero"):
        heal(out, out=tmp_path / "healed")


def test_methods_side_by_side(tiny_lm: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = compare(tiny_lm, budgets="params=0.6", recipes=["wanda", "sparsegpt"], out=out)
    found = {entry.recipe: entry for entry in result.entries if not entry.baseline}
    for entry in found.values():
        assert not entry.refused and entry.sparsities and entry.realised["params"] <= 0.6
    assert found["wanda"].damage != found["sparsegpt"].damage
    assert "weights zero" in (out / "comparison.html").read_text(encoding="utf-8")


def test_what_is_asked_in_vain_is_refused(tiny_lm: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="would fill the zeros of recipe wanda again"):
        billhook.compress(tiny_lm, budget="params=0.5", out=tmp_path / "out", recipe="wanda", heal="closed-form")
    with pytest.raises(InputError, match="zeros among the weights save parameters alone"):
        billhook.compress(tiny_lm, budget="size=0.5", out=tmp_path / "out", recipe="wanda")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"unit": "mlp"}, "masks with the unit weight"),
        ({"heal": "lora"}, "heal none"),
        ({"choice": {"word": "masks", "by": "wanda", "pattern": "4:4"}}, "N:M"),
        ({"choice": {"word": "masks", "by": "wanda", "pattern": "2:4", "allocation": "zeroth-order"}}, "uniform"),
        ({"score": {"word": "magnitude"}}, "no other choice has one"),
    ],
)
def test_words_that_do_not_go_together(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate({**load("wanda").model_dump(), **changed})


def test_what_is_said_of_them() -> None:
    assert needs(load("magnitude-sparse")) == "nothing" and passes(load("magnitude-2-4")) == "0"
    assert needs(load("wanda")) == "data" and passes(load("sparsegpt")) == "2"
    assert "zero" in explained(load("ecoflap"))["choice masks"]
