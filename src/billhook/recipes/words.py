"""What a recipe says, needs and costs, for people."""

from __future__ import annotations

import inspect
import re

from billhook.heal import average, branch_gains, closed_form, flatten, fuse, mask_tuning, merge
from billhook.heal.bias import bias_compensation
from billhook.heal.data_free import data_free
from billhook.heal.training import METHODS
from billhook.recipes.find import BASELINES, OBJECTIVES
from billhook.recipes.schema import (
    Bandit,
    BiMask,
    Coarse,
    Evolve,
    Greedy,
    Masks,
    Ranks,
    Recipe,
    Sampled,
    Span,
    Trained,
    Widths,
)
from billhook.scores import named
from billhook.search import share

HEALS = {"closed-form": closed_form, "bias": bias_compensation, "data-free": data_free, "scales": mask_tuning}
ACTS = {
    "average": average,
    "fuse": fuse,
    "flatten": flatten,
    "gains": branch_gains,
    "merge": merge,
    "share": share,
}
PASSES = "Passes: roughly how often the model runs over the calibration text; a unit is a part that may go."


def needs(recipe: Recipe) -> str:
    """What the choice rests on: ``data``, which is calibration text, or ``nothing``."""
    blind = recipe.score is not None and named(recipe.score.word).needs == "weights"
    blind = blind or (isinstance(recipe.choice, Masks) and recipe.choice.by == "magnitude")
    blind = blind or (isinstance(recipe.choice, Ranks) and recipe.choice.inputs == "none")
    return "nothing" if blind or recipe.choice.word in BASELINES else "data"


def passes(recipe: Recipe) -> str:
    """The order of the work (see ``PASSES``). What dropping a unit does is felt in half of the blocks on average."""
    if needs(recipe) == "nothing":
        return "0"
    if isinstance(recipe.choice, Greedy):
        return "1 a unit" if recipe.choice.lazy else "½ a unit/step"
    if isinstance(recipe.choice, Evolve):
        return str(round(recipe.choice.generations * _generation(recipe.choice) / 2))
    if isinstance(recipe.choice, BiMask):
        return "4 a step/window"
    if isinstance(recipe.choice, Trained | Sampled):
        return "2 a step/window"
    if isinstance(recipe.choice, Bandit):
        return f"{recipe.choice.draws + 2} a round/window"
    if isinstance(recipe.choice, Widths) and recipe.choice.screen is not None:
        return f"{2 * recipe.choice.screen:.2g} a sublayer"
    if isinstance(recipe.choice, Masks):
        return "2" if recipe.choice.allocation == "uniform" else "2 + 1 a block"
    if isinstance(recipe.choice, Span | Ranks):
        return "1"
    if recipe.score is not None and named(recipe.score.word).needs == "damage":
        return "½ a unit"
    if recipe.wide and recipe.score is not None and named(recipe.score.word).needs == "knockouts":
        return "1 a unit"
    if isinstance(recipe.choice, Widths) and recipe.choice.blocks is not None:
        return "½ a block" if named(recipe.choice.blocks.score.word).needs == "damage" else "2"
    if recipe.wide:
        return "3" if recipe.score is not None and named(recipe.score.word).needs in ("slopes", "adapters") else "1"
    return "1" if recipe.unit == "block" else "2"


def _generation(choice: Evolve) -> float:
    """Looks at the whole calibration that one generation is worth."""
    counts = [choice.offspring, *(screen.survivors for screen in choice.screens)]
    return sum(count * share for count, share in zip(counts, [s.share for s in choice.screens] + [1.0], strict=True))


def explained(recipe: Recipe) -> dict[str, str]:
    """Each word of a recipe with a sentence on what it stands for, taken from the docstring of the thing itself."""
    words = {}
    if recipe.score is not None:
        words[f"score {recipe.score.word}"] = first_sentence(named(recipe.score.word).function)
    if recipe.objective is not None:
        words[f"objective {recipe.objective}"] = f"What is kept low: {OBJECTIVES[recipe.objective]}."
    word = recipe.choice.word
    words[f"choice {word}"] = first_sentence(BASELINES.get(word, type(recipe.choice)))
    if isinstance(recipe.choice, Widths) and recipe.choice.blocks is not None:
        first = recipe.choice.blocks.score.word
        words["choice widths, blocks"] = first_sentence(Coarse)
        words[f"score {first}"] = first_sentence(named(first).function)
    if recipe.act != "drop":
        words[f"act {recipe.act}"] = first_sentence(ACTS[recipe.act])
    if recipe.heal in HEALS:
        words[f"heal {recipe.heal}"] = first_sentence(HEALS[recipe.heal])
    elif recipe.heal in METHODS:
        words[f"heal {recipe.heal}"] = METHODS[recipe.heal].says
    return words


def first_sentence(thing: object) -> str:
    """The first sentence of a docstring, as plain text on one line."""
    text = " ".join((inspect.getdoc(thing) or "").replace("``", "").split())
    found = re.match(r".*?\.(?= |$)", text)
    return found[0] if found else text
