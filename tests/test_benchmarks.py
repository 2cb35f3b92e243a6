"""What the scripts of benchmarks/ choose by themselves."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
from outlines import outline

from billhook.plan.budget import Budget
from billhook.plan.errors import InputError
from billhook.plan.target import Target
from billhook.recipes import catalogue
from billhook.recipes.find import pose_for
from billhook.search import Problem


def test_depth_figures_are_of_every_recipe_that_drops_and_of_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    script = import_module("depth_figures")
    chosen = {recipe.name: recipe for recipe in catalogue.recipes() if script.of_depth(recipe)}
    assert {"sublayer-greedy", "finercut", "das", "first", "attention-drop"} <= chosen.keys()
    assert not {"angular-widths", "random-experts", "restore-layers", "lines", "wanda", "foldgpt"} & chosen.keys()
    for recipe in chosen.values():
        assert isinstance(pose_for(recipe, outline(4), Budget.parse("params=0.9"), Target.ANY), Problem)
    with pytest.raises(InputError, match="recipe flap is none of depth"):
        script.main("no/such model", "text", "0", "first", "flap")
