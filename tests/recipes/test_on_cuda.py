"""Recipes, ways to heal and commands on a CUDA device, where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from billhook import compress, load
from billhook.plan.heals import Heal
from billhook.recipes import catalogue
from billhook.recipes.bench import bench
from billhook.recipes.compare import compare
from billhook.recipes.compare_policies import compare_policies
from billhook.recipes.evaluate import evaluate
from billhook.recipes.generate import generate as answer
from billhook.recipes.heal import heal
from billhook.recipes.inspect import inspect
from billhook.recipes.policy import tune_policy
from billhook.recipes.stack import stack

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def cut(source: Path, out: Path, recipe: str, way: Heal = "none") -> Any:
    return compress(
        source,
        budget="params=0.8",
        recipe=recipe,
        out=out,
        device=DEVICE,
        heal=way,
        max_new_tokens=2,
    )


@pytest.mark.parametrize("name", [n for n in catalogue.names() if not catalogue.load(n).returns])
def test_what_a_recipe_makes_loads_on_the_cpu(name: str, tiny_lm: Path, tiny_mixture: Path, tmp_path: Path) -> None:
    source = tiny_mixture if catalogue.load(name).unit == "expert" else tiny_lm
    run = cut(source, tmp_path / "there", name)
    reopened = load(tmp_path / "there")
    assert all(p.device.type == "cpu" for p in reopened.model.parameters())
    assert run.evidence


@pytest.mark.parametrize("way", [way for way in get_args(Heal) if way != "none"])
def test_a_way_to_heal(way: Heal, tiny_lm: Path, tmp_path: Path) -> None:
    recipe = "sparsegpt-2-4" if way == "eora" else "cfsp"
    run = cut(tiny_lm, tmp_path / "there", recipe, way)
    assert run.healing is not None


def test_a_result_is_healed_later(tiny_lm: Path, tmp_path: Path) -> None:
    cut(tiny_lm, tmp_path / "cut", "block-influence")
    heal(tmp_path / "cut", out=tmp_path / "healed", device=DEVICE, tokens=2048, max_new_tokens=2)


def test_commands(tiny_lm: Path, tmp_path: Path) -> None:
    cut(tiny_lm, tmp_path / "cut", "block-influence")
    bench(tmp_path / "cut", against=tiny_lm, device=DEVICE)
    evaluate(tmp_path / "cut", against=tiny_lm, device=DEVICE)
    inspect(tiny_lm, out=tmp_path / "seen", device=DEVICE)
    stack(tiny_lm, out=tmp_path / "stacked", device=DEVICE)
    assert answer(tiny_lm, "Once", max_new_tokens=9, policy="self-speculation", device=DEVICE).drafting


def test_a_policy_is_tuned(tiny_lm: Path, tmp_path: Path) -> None:
    tune_policy(tiny_lm, "similarity-exit", "perplexity<=1.5", tmp_path / "p.json", device=DEVICE)


def test_a_comparison(tiny_lm: Path, tmp_path: Path) -> None:
    recipes = ["block-influence", "cfsp"]
    done = compare(
        tiny_lm,
        budgets="params=0.8",
        recipes=recipes,
        heal="closed-form",
        out=tmp_path / "c",
        device=DEVICE,
    )
    assert all(not entry.refused for entry in done.entries)


def test_a_comparison_of_policies(tiny_lm: Path, tmp_path: Path) -> None:
    compare_policies(tiny_lm, budgets="flops=0.8", out=tmp_path / "c", device=DEVICE)
