"""Which methods read the long text, and that they do."""

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
from billhook.plan.plan import Plan
from billhook.recipes import compress as walk
from billhook.recipes.catalogue import load, names
from billhook.recipes.compress import compress
from billhook.recipes.find import Choice, find, pose_for
from billhook.recipes.settings import CALIBRATION_TOKENS
from billhook.report.provenance import facts

SHORT, LONG = (
    Windows.of(torch.randint(3, VOCABULARY, (rows, 12), generator=torch.Generator().manual_seed(rows)), f"{rows} rows")
    for rows in (2, 9)
)
SURVEYED = {name for name in names() if load(name).surveys}


def test_those_whose_statistics_one_pass_gives() -> None:
    assert {"cfsp", "flap", "measured-widths", "evopress-widths", "m-smoe", "svd-llm", "hidden-channels"} <= SURVEYED
    assert {"wanda", "sparsegpt", "sparsegpt-2-4"} <= SURVEYED
    asked_often = {"sublayer-greedy", "evopress", "block-influence", "amp", "loraprune", "interchange-heads", "maestro"}
    blind = {"svd", "magnitude-sparse", "magnitude-2-4", "random-width", "evenly-spaced"}
    assert not (asked_often | blind | {"tinyfusion", "maskllm", "ofb", "hesso"}) & SURVEYED


def found(name: str, place: Path, windows: Windows, survey: Windows | None) -> Choice:
    recipe = load(name)
    model = build("mixtral" if recipe.unit == "expert" else "llama")
    opened: Any = SimpleNamespace(model=model, anatomy=discover(model))
    problem = pose_for(recipe, opened.anatomy.outline, Budget.parse("params=0.85"), recipe.aim)
    seen = trace(model, opened.anatomy, SHORT, ("block", "sublayer", "angular"))
    return find(recipe, opened, problem, windows, seen, seed=0, place=place, progress=None, survey=survey)


def plan(choice: Choice, name: str) -> Plan:
    return choice.plan(load(name).aim)


@pytest.mark.parametrize("name", ["flap", "cfsp", "m-smoe", "svd-llm", "hidden-channels", "sparsegpt", "wanda-2-4"])
def test_statistics_are_of_the_long_text(name: str, tmp_path: Path) -> None:
    """Every text that counts is the survey: with it in the place of the calibration the same is chosen."""
    surveyed, short = found(name, tmp_path, SHORT, LONG), found(name, tmp_path, SHORT, None)
    assert plan(surveyed, name) == plan(found(name, tmp_path, LONG, None), name)
    assert surveyed.record.work > short.record.work


@pytest.mark.parametrize("name", ["amp", "sublayer-greedy"])
def test_others_do_not_read_it(name: str, tmp_path: Path) -> None:
    with_it, without = found(name, tmp_path / "a", SHORT, LONG), found(name, tmp_path / "b", SHORT, None)
    assert (plan(with_it, name), with_it.record.work) == (plan(without, name), without.record.work)


def test_it_is_read_also_where_nothing_is_healed(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Windows | None] = []

    def spy(*args: Any, survey: Windows | None, **kwargs: Any) -> Choice:
        asked.append(survey)
        return find(*args, survey=survey, **kwargs)

    monkeypatch.setattr(walk, "find", spy)
    run = compress(tiny_lm, budget="params=0.85", recipe="flap", heal="none", out=tmp_path / "flap", max_new_tokens=2)
    other = compress(
        tiny_lm, budget="blocks=0.5", recipe="block-influence", heal="none", out=tmp_path / "b", max_new_tokens=2
    )
    long, none = asked
    assert long is not None and long.tokens > 2 * CALIBRATION_TOKENS
    assert none is None
    assert run.search is not None and run.search.surveyed == long.tokens
    assert other.search is not None and other.search.surveyed == 0
    assert ("tokens surveyed", f"{long.tokens:,}, for statistics of one pass") in facts(run)
