"""Every word of every recipe is explained, and what a method needs and costs is said."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from families import VOCABULARY, build

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.measure.trace import trace
from billhook.plan.budget import Budget
from billhook.recipes.catalogue import load, names, source_of
from billhook.recipes.choices import Evolve, Sampled
from billhook.recipes.find import find, pose_for
from billhook.recipes.words import explained, needs, passes, sentences
from billhook.scores import SCORES


@pytest.mark.parametrize("name", names())
def test_every_word_has_a_sentence(name: str) -> None:
    recipe = load(name)
    words = explained(recipe)
    assert f"choice {recipe.choice.word}" in words
    assert (f"score {recipe.score.word}" in words) if recipe.score else True
    assert (f"objective {recipe.objective}" in words) if recipe.objective else True
    for sentence in words.values():
        assert len(sentence) > 15 and sentence.endswith(".") and "``" not in sentence and "\n" not in sentence


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_every_score_begins_with_a_sentence(score) -> None:
    assert sentences(score.function).endswith(".")


@pytest.mark.parametrize("name", names())
def test_every_word_of_the_file_is_in_an_explanation(name: str) -> None:
    """The words before the colons, and the parameters inside, by what is said below the file."""
    content, told = yaml.safe_load(source_of(name)), explained(load(name))
    for word in ("unit", "objective", "act", "heal"):
        assert word not in content or f"{word} {content[word]}" in told, word
    choice, score = content["choice"], content.get("score", {})
    for inside in (choice, *choice.get("screens", ()), choice.get("start") or {}, choice.get("blocks", {})):
        for parameter in inside.keys() - {"word"}:
            assert re.search(rf"\b{parameter}\b", said(told, f"choice {choice['word']}")), parameter
    for parameter in score.get("parameters", {}):
        assert re.search(rf"\b{parameter}\b", told[f"score {score['word']}"]), parameter


def said(told: dict[str, str], about: str) -> str:
    return " ".join(meaning for word, meaning in told.items() if word.startswith(about))


def test_only_the_parameters_that_are_set_are_explained() -> None:
    few, more = explained(load("fusegpt")), explained(load("sublayer-greedy"))
    assert "per unit" in few["choice greedy"] and "screen" not in few["choice greedy"]
    assert "screen: every unit is looked at first on this share" in more["choice greedy"]
    assert "refine" not in more["choice greedy"]


#: Recipes whose passes are one number that does not depend on how the search goes.
FIXED = [
    n for n in names() if passes(load(n)).isdigit() and not isinstance(load(n).choice, Evolve) and not load(n).returns
]


@pytest.mark.parametrize("name", FIXED)
def test_the_passes_in_the_list_are_those_that_a_search_is_charged(name: str, tmp_path: Path) -> None:
    """So the list and the table of a comparison say the same."""
    recipe = load(name)
    model = build("mixtral" if recipe.unit == "expert" else "llama")
    opened: Any = SimpleNamespace(model=model, anatomy=discover(model))
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(2))
    windows = Windows.of(ids, "noise")
    seen = trace(model, opened.anatomy, windows, ("block", "sublayer", "angular"))
    problem = pose_for(recipe, opened.anatomy.outline, Budget.parse("params=0.8"), recipe.aim)
    found = find(recipe, opened, problem, windows, seen, seed=0, place=tmp_path, progress=None)
    assert found.found.work == int(passes(recipe)) * ids.numel() * len(opened.anatomy.stack("decoder").blocks)


def test_needs_and_costs() -> None:
    said = {name: (needs(load(name)), passes(load(name))) for name in names()}
    assert said["first"] == said["unified-skip"] == said["random"] == ("nothing", "0")
    assert said["block-influence"] == said["angular-span"] == ("data", "2")
    assert said["cfsp"] == said["comp"] == ("data", "3") and said["fisher-width"] == ("gradients", "3")
    assert said["foldgpt-gates"] == ("gradients", "2 a step") and said["das"] == ("training", "5 a round")
    assert said["branch-gains"] == ("training", "2") and needs(load("fusegpt")) == "training"
    assert said["hesso"] == ("training", "4 a step") and said["feature-merging"] == ("nothing", "0")
    assert said["magnitude-neurons"] == ("data", "0"), "its healing reads text, its choice none"
    plain = load("tinyfusion").model_copy(update={"choice": Sampled(word="sampled-masks", steps=4)})
    assert needs(plain) == "gradients"
    assert needs(load("evenly-spaced").model_copy(update={"heal": "lora"})) == "training"
    assert said["joint-drop"] == said["attention-drop"] == ("data", "2")
    assert said["additive-knapsack"] == said["position-weighted"] == ("data", "½ a unit")
    assert said["sublayer-greedy"] == said["finercut"] == ("data", "1 a unit")
    assert said["evopress"] == ("data", "149") and said["evopress-widths"] == ("data", "142")
    assert said["block-greedy"] == ("data", "½ a unit/step")
    assert said["restore-layers"] == ("base", "⅔ a run") and said["lines"] == ("base", "0")
    assert {need for need, _ in said.values()} == {"nothing", "data", "gradients", "training", "base"}


def test_a_sentence_ends_at_a_full_stop_before_a_space() -> None:
    class Thing:
        """Half of 0.5 of
        ``it``. And more."""

    assert sentences(Thing) == "Half of 0.5 of it."
