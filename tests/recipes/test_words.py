"""Every word of every recipe is explained, and what a method needs and costs is said."""

from __future__ import annotations

import pytest

from billhook.recipes.catalogue import load, names
from billhook.recipes.words import explained, first_sentence, needs, passes
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
    assert first_sentence(score.function).endswith(".")


def test_needs_and_costs() -> None:
    said = {name: (needs(load(name)), passes(load(name))) for name in names()}
    assert said["first"] == said["unified-skip"] == said["random"] == ("nothing", "0")
    assert said["block-influence"] == said["angular-span"] == ("data", "1")
    assert said["joint-drop"] == said["attention-drop"] == ("data", "2")
    assert said["additive-knapsack"] == said["position-weighted"] == ("data", "½ a unit")
    assert said["sublayer-greedy"] == said["finercut"] == ("data", "1 a unit")
    assert said["block-greedy"] == ("data", "½ a unit/step")
    assert {need for need, _ in said.values()} == {"data", "nothing"}


def test_a_sentence_ends_at_a_full_stop_before_a_space() -> None:
    class Thing:
        """Half of 0.5 of
        ``it``. And more."""

    assert first_sentence(Thing) == "Half of 0.5 of it."
