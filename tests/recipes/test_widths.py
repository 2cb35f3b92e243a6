"""Every recipe of width on small models, and one of them all the way."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import VOCABULARY, build

import billhook
from billhook.anatomy import discover
from billhook.data import Windows
from billhook.measure.cost import CostModel
from billhook.measure.trace import trace
from billhook.plan.budget import Budget
from billhook.plan.check import check
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.target import Target
from billhook.recipes.catalogue import load, names
from billhook.recipes.find import Choice, find, pose_for
from billhook.recipes.schema import Recipe

WIDE = [name for name in names() if load(name).wide]
WINDOWS = Windows.of(torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(2)), "noise")


def carried_out(recipe: Recipe, model: Any, place: Path) -> Choice:
    opened: Any = SimpleNamespace(model=model, anatomy=discover(model))
    problem = pose_for(recipe, opened.anatomy.outline, Budget.parse("params=0.85"), Target.REMOTE)
    seen = trace(model, opened.anatomy, WINDOWS, ("block", "sublayer", "angular"))
    return find(recipe, opened, problem, WINDOWS, seen, seed=0, place=place, progress=None)


@pytest.mark.parametrize("name", WIDE)
def test_the_budget_is_met_and_again(name: str, tmp_path: Path) -> None:
    recipe, model = load(name), build("llama")
    outline = discover(model).outline
    found = carried_out(recipe, model, tmp_path)
    check(Plan.of([], Target.REMOTE, found.keeps), outline)
    costs = CostModel(outline)
    share = costs.of([], found.keeps)["params"] / costs.dense["params"]
    assert 0.83 < share <= 0.85
    assert found.record.steps[-1].realised["params"] == pytest.approx(share)
    assert {keep.inner for keep in found.keeps} <= ({"neuron", "group"} if recipe.unit == "width" else {recipe.unit})
    assert carried_out(recipe, build("llama"), tmp_path) == found


def test_blocks_that_turn_the_stream_more_keep_more(tmp_path: Path) -> None:
    """CFSP shares by angular distance: a block that writes nothing loses most."""
    model = build("llama")
    with torch.no_grad():
        for linear in (model.model.layers[3].mlp.down_proj, model.model.layers[3].self_attn.o_proj):
            linear.weight.mul_(0.01)
    left = {keep.unit.block: len(keep.indices) for keep in carried_out(load("cfsp"), model, tmp_path).keeps}
    assert min(left, key=left.__getitem__) == 3


def test_all_the_way(tiny_lm: Path, tmp_path: Path) -> None:
    """From a folder to a smaller folder with its proof; the page draws what got narrower."""
    run = billhook.compress(tiny_lm, budget="params=0.8", out=tmp_path / "out", recipe="flap", max_new_tokens=2)
    assert run.plan.keeps
    assert run.realised["params"] <= 0.8
    assert run.costs["params"].compressed == run.realised["params"] * run.costs["params"].dense
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "--left:" in page
    assert "% left" in page
    again = billhook.load(tmp_path / "out")
    parameters = sum(p.numel() for p in again.model.parameters())
    dense = sum(p.numel() for p in billhook.load(tiny_lm).model.parameters())
    assert dense - parameters == run.costs["params"].dense - run.costs["params"].compressed


def test_unequal_widths_are_no_ordinary_checkpoint(tiny_lm: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="different widths"):
        billhook.compress(tiny_lm, budget="params=0.8", out=tmp_path / "out", recipe="flap", target="uniform")


def test_healing_is_refused(tiny_lm: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="heal none"):
        billhook.compress(tiny_lm, budget="params=0.8", out=tmp_path / "out", recipe="flap", heal="closed-form")
