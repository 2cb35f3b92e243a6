"""Looks at one model at several budgets: what they share is measured once and charged once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import VOCABULARY, build

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.measure.trace import trace
from billhook.plan.budget import Budget
from billhook.recipes.catalogue import load
from billhook.recipes.find import Choice, find, pose_for
from billhook.recipes.once import Once

WINDOWS = Windows.of(torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0)), "text")
ONE_PASS = ("flap", "cfsp", "svd-llm", "hidden-channels", "block-influence", "angular-span")
MORE = ("interchange-heads", "loraprune", "m-smoe", "measured-widths", "comp")


@pytest.mark.parametrize("name", [*ONE_PASS, *MORE])
def test_a_second_look_runs_no_block_and_costs_nothing(name: str, tmp_path: Path) -> None:
    recipe = load(name)
    model = build("mixtral" if recipe.unit == "expert" else "llama")
    opened: Any = SimpleNamespace(model=model, anatomy=discover(model))
    seen = trace(model, opened.anatomy, WINDOWS, ("block", "sublayer", "angular"))
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    model.get_submodule(opened.anatomy.stack("decoder").blocks[0].path).register_forward_pre_hook(count)

    def look(budget: str, once: Once | None = None) -> Choice:
        problem = pose_for(recipe, opened.anatomy.outline, Budget.parse(budget), recipe.aim)
        return find(
            recipe, opened, problem, WINDOWS, seen, seed=0, place=tmp_path, progress=None, survey=WINDOWS, once=once
        )

    once = Once()
    first = look("params=0.9", once)
    assert first.record.work == look("params=0.9").record.work > 0
    alone = look("params=0.95")
    passes = 0
    second = look("params=0.95", once)
    assert (passes, second.record.work) == (0, 0)
    assert second.plan(recipe.aim) == alone.plan(recipe.aim)


def test_each_look_can_be_charged_in_full() -> None:
    taken: list[int] = []

    def take() -> tuple[str, int]:
        taken.append(1)
        return "figures", 7

    once = Once(each=True)
    assert [once("key", take), once("key", take)] == [("figures", 7), ("figures", 7)]
    assert taken == [1]
