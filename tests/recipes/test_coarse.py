"""Whole blocks first, then neurons: one plan with both, and its scales, all the way to the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import build
from hypothesis import given, settings
from hypothesis import strategies as st

import billhook
from billhook.anatomy import discover
from billhook.measure.cost import CostModel
from billhook.plan.address import Address
from billhook.plan.budget import Budget
from billhook.plan.check import check
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.target import Target
from billhook.recipes import compress as walk
from billhook.recipes.catalogue import load
from billhook.recipes.schema import Recipe
from billhook.recipes.words import explained, passes
from billhook.search.coarse import coarse
from billhook.search.width import allocate, pose_width

OUTLINE = discover(build("llama")).outline


def test_the_least_blocks_go_as_long_as_they_take_no_more_than_their_share() -> None:
    problem = pose_width(OUTLINE, Budget.parse("params=0.58"), "neuron")
    scores = {Address("decoder", i): score for i, score in enumerate([0.5, 0.2, 0.9, 0.1, 0.3])}
    for share, wanted in ((0.96, [3, 1]), (0.9, [3]), (0.5, [3]), (0.4, [])):  # a block is 0.2 of 0.42
        steps, left = coarse(problem, scores, share, work=7)
        assert [step.units for step in steps] == [(f"decoder.{i}",) for i in wanted]
        assert left.start["params"] == pytest.approx((1 - len(wanted) / 5) * problem.dense["params"])
        assert {space.address.block for space in left.spaces} == set(range(5)) - set(wanted)
        assert left.share < problem.share or not wanted
    assert [step.score for step in coarse(problem, scores, 0.96, work=7)[0]] == [0.1, 0.2]


def test_a_block_without_a_score_stays() -> None:
    problem = pose_width(OUTLINE, Budget.parse("params=0.58"), "neuron")
    steps, _ = coarse(problem, {Address("decoder", 4): 1.0}, 0.9, work=0)
    assert [step.units for step in steps] == [("decoder.4",)]
    with pytest.raises(InputError, match="NaN"):
        coarse(problem, {Address("decoder", 4): float("nan")}, 0.9, work=0)


@settings(max_examples=25)
@given(st.floats(0.58, 0.98), st.floats(0.05, 0.95), st.integers(0, 99))
def test_the_budget_is_met_within_one_unit(kept: float, share: float, seed: int) -> None:
    """Where blocks went first too, and they take no more than their share."""
    kind = "params"
    problem = pose_width(OUTLINE, Budget.parse(f"{kind}={kept:.3f}"), "neuron")
    generator = torch.Generator().manual_seed(seed)
    figures = {Address("decoder", i): x for i, x in enumerate(torch.rand(5, generator=generator).tolist())}
    scores = {space.address: torch.rand(space.count, generator=generator) for space in problem.spaces}
    steps, left = coarse(problem, figures, share, work=0)
    keeps, costs = allocate(left, scores)
    plan = Plan.of([unit for step in steps for unit in step.units], Target.REMOTE, keeps)
    check(plan, OUTLINE)
    model = CostModel(OUTLINE)
    assert costs == pytest.approx(model.of(plan.drops, keeps))
    largest = max(space.saving[kind] for space in problem.spaces)
    assert problem.ceilings[kind] - largest * 1.001 < costs[kind] <= problem.ceilings[kind] * (1 + 1e-9)
    saved = model.dense[kind] - model.of(plan.drops)[kind]
    assert saved <= share * (model.dense[kind] - problem.ceilings[kind]) * (1 + 1e-6)


def test_the_words_are_checked_and_explained() -> None:
    recipe = load("comp")
    words = explained(recipe)
    assert {"choice widths, blocks", "score block-influence", "score condition", "heal scales"} <= words.keys()
    assert passes(recipe) == "3"
    wrong = recipe.model_dump()
    wrong["choice"]["blocks"]["score"] = {"word": "magnitude"}
    with pytest.raises(ValueError, match="units inside sublayers, not of blocks"):
        Recipe.model_validate(wrong)
    with pytest.raises(ValueError, match="heal scales tunes the units that a narrowing leaves"):
        Recipe.model_validate({**load("block-influence").model_dump(), "heal": "scales"})


def test_all_the_way(tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billhook.recipes.texts.HEALING_TOKENS", 1024)
    monkeypatch.setattr("billhook.recipes.texts.CALIBRATION_TOKENS", 512)
    monkeypatch.setattr(walk, "judged_on", lambda *rest, **more: [])
    monkeypatch.setattr(walk, "proven", lambda run, *rest: run)
    out = tmp_path / "out"
    run = billhook.compress(tiny_lm, budget="params=0.6", out=out, recipe="comp", max_new_tokens=2)
    assert run.plan.drops and run.plan.keeps
    assert 0.59 < run.realised["params"] <= 0.6
    assert run.healing is not None and run.healing.method == "scales" and run.healing.refits
    assert run.healing.divergence is not None
    page, card = ((out / name).read_text(encoding="utf-8") for name in ("report.html", "README.md"))
    assert "scales" in page and "- width-pruning" in card and "- depth-pruning" in card
    again = billhook.load(out)
    assert sum(p.numel() for p in again.model.parameters()) < sum(
        p.numel() for p in billhook.load(tiny_lm).model.parameters()
    )


def test_scales_without_a_narrowing_are_refused_at_once(tiny_lm: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="recipe block-influence drops blocks: scales are tuned"):
        billhook.compress(tiny_lm, budget="blocks=4", out=tmp_path / "out", recipe="block-influence", heal="scales")
