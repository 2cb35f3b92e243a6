"""Recipes of single weights, all the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build
from transformers import AutoModelForCausalLM

import billhook
from billhook.anatomy import discover
from billhook.anatomy.linears import linears
from billhook.heal import closed_form, fuse
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.recipes.apply import apply
from billhook.recipes.catalogue import load, names
from billhook.recipes.compare import compare
from billhook.recipes.schema import Recipe
from billhook.recipes.words import explained, needs, passes

SPARSE = [name for name in names() if load(name).unit == "weight"]


def nonzero(folder: Path) -> int:
    """Parameters inside the blocks that are not zero, as plain transformers loads them."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return sum(int((p != 0).sum()) for name, p in model.named_parameters() if ".layers." in name)


@pytest.mark.parametrize("name", SPARSE)
def test_all_the_way(name: str, tiny_lm: Path, tmp_path: Path) -> None:
    """An ordinary checkpoint with its proof; the plan alone sets the same weights to zero again."""
    out = tmp_path / "out"
    run = billhook.compress(tiny_lm, budget="params=0.5", out=out, recipe=name, max_new_tokens=1)
    assert run.plan.target == "uniform" and not run.plan.drops and not run.plan.keeps
    assert nonzero(out) == run.costs["params"].compressed
    assert 0.48 < run.realised["params"] <= 0.5 and run.realised["size"] == run.realised["flops"] == 1
    assert {edit.pattern for edit in run.plan.sparsities} == {load(name).choice.pattern}  # type: ignore[union-attr]
    assert (run.healing is not None) == name.startswith("sparsegpt")
    assert Plan.read(out) == run.plan
    assert len(Plan.read(out).arrays) == sum(len(edit.zeros) for edit in run.plan.sparsities)
    page, card = ((out / file).read_text(encoding="utf-8") for file in ("report.html", "README.md"))
    assert "the share of weights that is zero" in page and " set to zero" in page
    assert f"- sparsity-{run.plan.sparsities[0].pattern.replace(':', '-')}\n" in card
    assert "Zeros are stored and multiplied with like any weight" in card

    again = apply(tiny_lm, out, out=tmp_path / "again")
    assert again.costs["params"] == run.costs["params"]
    assert ("not healed" in again.environment) == (run.healing is not None)
    one, two = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (out, tmp_path / "again"))
    assert all(torch.equal(one[key] == 0, two[key] == 0) for key in one)
    assert all(torch.equal(one[key], two[key]) for key in one) == (run.healing is None)


def test_the_same_bytes_again(tiny_lm: Path, tmp_path: Path) -> None:
    for place in ("one", "two"):
        billhook.compress(tiny_lm, budget="params=0.6", out=tmp_path / place, recipe="sparsegpt", max_new_tokens=1)
    for file in ("billhook.arrays", "model.safetensors"):
        one, two = ((tmp_path / place / file).read_bytes() for place in ("one", "two"))
        assert one == two


def test_the_budget_of_a_pattern_goes_below_and_not_above_it(tiny_lm: Path, tmp_path: Path) -> None:
    for asked, low, high in (("params=0.8", 0.49, 0.52), ("params=0.3", 0.29, 0.3)):
        out = tmp_path / asked
        run = billhook.compress(tiny_lm, budget=asked, out=out, recipe="magnitude-2-4", max_new_tokens=1)
        assert low < run.realised["params"] <= high


def test_methods_side_by_side(tiny_lm: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = compare(tiny_lm, budgets="params=0.6", recipes=["wanda", "sparsegpt"], out=out, heal="closed-form")
    found = {entry.recipe: entry for entry in result.entries if not entry.baseline}
    for entry in found.values():
        assert not entry.refused and entry.sparsities and not entry.healed and entry.realised["params"] <= 0.6
    assert found["wanda"].damage != found["sparsegpt"].damage
    assert "weights zero" in (out / "comparison.html").read_text(encoding="utf-8")
    assert json.loads((out / "comparison.json").read_text(encoding="utf-8"))


def test_healing_that_would_fill_zeros_is_refused(tiny_lm: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="would fill the zeros of recipe wanda again"):
        billhook.compress(tiny_lm, budget="params=0.5", out=tmp_path / "out", recipe="wanda", heal="closed-form")
    with pytest.raises(InputError, match="zeros among the weights save parameters alone"):
        billhook.compress(tiny_lm, budget="size=0.5", out=tmp_path / "out", recipe="wanda")
    model = build("llama")
    anatomy = discover(model)
    billhook.compress(tiny_lm, budget="params=0.5", out=tmp_path / "out", recipe="magnitude-sparse", max_new_tokens=1)
    plan = Plan.read(tmp_path / "out")
    for way in (closed_form, fuse):
        with pytest.raises(InputError, match="that the plan sets to zero"):
            way(model, anatomy, plan, [])
    with pytest.raises(InputError, match="that the plan sets to zero"):
        billhook.heal(tmp_path / "out", out=tmp_path / "healed")


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


def test_every_mask_fits_its_weight(tiny_lm: Path, tmp_path: Path) -> None:
    run = billhook.compress(tiny_lm, budget="params=0.9", out=tmp_path / "out", recipe="ecoflap", max_new_tokens=1)
    model = billhook.load(tiny_lm).model
    (stack,) = discover(model).stacks
    for block in stack.blocks:
        for sublayer in block.sublayers:
            for linear in linears(model, sublayer, block.path):
                name = f"{sublayer.address}/{linear.inside}"
                if name in run.plan.arrays:
                    shape = model.get_parameter(linear.name).shape
                    assert np.unpackbits(run.plan.arrays[name], axis=-1, count=shape[-1]).shape == shape
