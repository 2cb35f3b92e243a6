"""What a recipe says, needs and costs, for people."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable

from billhook.heal import (
    average,
    branch_gains,
    closed_form,
    flatten,
    fuse,
    mask_tuning,
    merge,
    restore,
    scale_updates,
)
from billhook.heal.combining.features import merged_features
from billhook.heal.refit.bias import bias_compensation
from billhook.heal.refit.data_free import data_free
from billhook.heal.refit.eora import eora
from billhook.heal.training.methods import METHODS
from billhook.measure.ablation import Kind
from billhook.recipes.choices import (
    Bandit,
    BiMask,
    Coarse,
    Evolve,
    Greedy,
    Masks,
    Ranks,
    RestoredSpan,
    Sampled,
    Score,
    Screen,
    Thinned,
    Trained,
    Widths,
)
from billhook.recipes.find import BASELINES
from billhook.recipes.schema import Recipe
from billhook.scores import named
from billhook.search import share

HEALS = {
    "closed-form": closed_form,
    "bias": bias_compensation,
    "data-free": data_free,
    "scales": mask_tuning,
    "eora": eora,
}
ACTS = {
    "average": average,
    "fuse": fuse,
    "flatten": flatten,
    "gains": branch_gains,
    "merge": merge,
    "share": share,
    "restore": restore,
    "scale": scale_updates,
}
UNITS = {
    "block": "One transformer block, all of its sublayers at once.",
    "sublayer": "An attention or an MLP, each by itself.",
    "attention": "The attention of a block.",
    "cross_attention": "The cross-attention of a block.",
    "mlp": "The MLP of a block, or its mixture of experts.",
    "neuron": "A neuron of an MLP.",
    "group": "A key-value head of an attention, with the query heads that read it.",
    "width": "The neurons of MLPs and the key-value groups of attentions.",
    "expert": "An expert of a mixture.",
    "weight": "A single weight of a linear.",
    "channel": "A hidden channel of the residual stream, in all that reads or writes it.",
    "linear": "A direction of a linear, which becomes two of lower rank.",
}
KEPT_LOW: dict[Kind, str] = {
    "kl": "the divergence of the next-token distributions from the dense model's, nats a token",
    "loss": "the negative log-likelihood of the calibration text, nats a token",
    "stream": "the squared error of the stream after the last block, relative to the dense one",
    "turn": "1 - E[cos] of the stream after the last block and the dense one",
    "angle": "the angle between the logits and the dense ones, as a fraction of a half turn",
    "euclidean": "the distance of the logits from the dense ones",
    "jensen-shannon": "half the divergences of both next-token distributions from their mean, nats a token",
}
NEEDS = (
    "Needs, healing included: data is calibration text; gradients take backward passes over it; training has weights "
    "of its own; base is the model that yours was trained from."
)
PASSES = (
    "Passes of the search: roughly how often all blocks run over the calibration text; a unit is a part that may go, "
    "a step or round reads one window, a run of blocks a few questions. Methods that rest on the trace of the dense "
    "model, which a run takes once for all, are charged its 2 passes. Statistics that one pass gives are taken of the "
    "text that healing reads, which is longer and counts for as much."
)
TRACE = 2  # passes: the stream after each block, and after its first sublayer alone


def needs(recipe: Recipe) -> str:
    """The most that a recipe asks for (see ``NEEDS``): ``nothing``, ``data``, ``gradients`` or ``training``; or the
    ``base`` of the model."""
    if recipe.returns:
        return "base"
    choice, rests_on = recipe.choice, named(recipe.score.word).needs if recipe.score is not None else ""
    if recipe.trains:
        return "training"
    stands_in = (isinstance(choice, Sampled) and choice.low_rank) or (isinstance(choice, Bandit) and choice.adapters)
    if stands_in or rests_on == "adapters" or recipe.act in ("fuse", "gains") or recipe.heal in METHODS:
        return "training"
    if recipe.learns_ranks:
        return "training"
    if isinstance(choice, Trained | Sampled | Bandit | BiMask) or rests_on == "slopes":
        return "gradients"
    dataless = recipe.act == "drop" or (recipe.act, recipe.unit) == ("merge", "neuron")
    return "nothing" if _blind(recipe) and dataless and recipe.heal == "none" else "data"


def _blind(recipe: Recipe) -> bool:
    """Whether the choice looks at no text."""
    choice = recipe.choice
    if recipe.score is not None:
        return named(recipe.score.word).needs == "weights"
    by_weights = (isinstance(choice, Masks) and choice.by == "magnitude") or (
        isinstance(choice, Ranks) and choice.inputs == "none"
    )
    return by_weights or choice.word == "graded" or choice.word in BASELINES


def passes(recipe: Recipe) -> str:
    """The order of the work (see ``PASSES``). What dropping a unit does is felt in half of the blocks on average."""
    if _blind(recipe):
        return "0"
    if isinstance(recipe.choice, RestoredSpan):
        return "⅔ a run"
    if isinstance(recipe.choice, Greedy):
        return "1 a unit" if recipe.choice.lazy else "½ a unit/step"
    if isinstance(recipe.choice, Evolve):
        felt = 1 if recipe.wide else 0.5  # a narrower model is looked at whole
        return str(round(recipe.choice.generations * _generation(recipe.choice) * felt))
    if isinstance(recipe.choice, BiMask):
        return "4 a step"
    if isinstance(recipe.choice, Trained | Sampled):
        return "2 a step" + (" + 4 a unit gone" if recipe.act == "share" else "")
    if isinstance(recipe.choice, Bandit):
        return f"{recipe.choice.draws + 2} a round"
    if isinstance(recipe.choice, Widths) and recipe.choice.screen is not None:
        return f"{2 * recipe.choice.screen:.1g} a sublayer"
    if isinstance(recipe.choice, Masks):
        return "2" if recipe.choice.allocation == "uniform" else "2 + 1 a block"
    if recipe.trains:
        return f"{3 + (recipe.objective == 'kl')} a step"
    if isinstance(recipe.choice, Ranks):
        return "1" if recipe.choice.steps is None else "1 + 4 a step"
    rests_on = named(recipe.score.word).needs if recipe.score is not None else "angular"
    if rests_on == "damage":
        return "½ a unit"
    if isinstance(recipe.choice, Thinned):
        return "1"
    if not isinstance(recipe.choice, Widths):
        return str(TRACE)
    if rests_on == "knockouts":
        return "1 a unit"
    looks = {"weights": 0, "slopes": 3, "adapters": 3}.get(rests_on, 1)
    if recipe.choice.blocks is not None and named(recipe.choice.blocks.score.word).needs == "damage":
        return f"{looks} + ½ a block"
    traced = recipe.choice.blocks is not None or recipe.choice.allocation == "shared"
    return str(looks + (TRACE if traced else 0))


def _generation(choice: Evolve) -> float:
    """Looks at the whole calibration that one generation is worth."""
    counts = [choice.offspring, *(screen.survivors for screen in choice.screens)]
    return sum(count * share for count, share in zip(counts, [s.share for s in choice.screens] + [1.0], strict=True))


def explained(recipe: Recipe) -> dict[str, str]:
    """Each word of a recipe with what it stands for, taken from the docstring of the thing itself: its first sentence,
    and those that name a parameter which the recipe sets."""
    choice, words = recipe.choice, {f"unit {recipe.unit}": UNITS[recipe.unit]}
    if recipe.score is not None:
        words |= _scored(recipe.score)
    if recipe.objective is not None:
        words[f"objective {recipe.objective}"] = f"What is kept low: {KEPT_LOW[recipe.objective]}."
    words[f"choice {choice.word}"] = sentences(BASELINES.get(choice.word, type(choice)), choice.model_fields_set)
    if isinstance(choice, Evolve):
        for screen in choice.screens[:1]:
            words["choice evolve, screens"] = sentences(Screen, screen.model_fields_set)
        if choice.start is not None:
            words["choice evolve, start"] = sentences(Greedy, choice.start.model_fields_set)
    if isinstance(choice, Widths) and choice.blocks is not None:
        words["choice widths, blocks"] = sentences(Coarse, choice.blocks.model_fields_set)
        words |= _scored(choice.blocks.score)
    if recipe.act != "drop":
        act = merged_features if recipe.unit == "neuron" else ACTS[recipe.act]
        words[f"act {recipe.act}"] = sentences(act)
    if recipe.heal in HEALS:
        words[f"heal {recipe.heal}"] = sentences(HEALS[recipe.heal])
    elif recipe.heal in METHODS:
        words[f"heal {recipe.heal}"] = METHODS[recipe.heal].says
    return words


def _scored(score: Score) -> dict[str, str]:
    return {f"score {score.word}": sentences(named(score.word).function, score.parameters)}


def sentences(thing: object, about: Iterable[str] = ()) -> str:
    """The first sentence of a docstring and all that name one of these parameters, as plain text on one line."""
    first, *others = re.split(r"(?<=\.) (?=[A-Z`])", " ".join((inspect.getdoc(thing) or "").split()))
    marks = [f"``{name}``" for name in about]
    return " ".join([first, *(text for text in others if any(mark in text for mark in marks))]).replace("``", "")
