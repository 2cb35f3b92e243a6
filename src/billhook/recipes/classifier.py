"""A narrower image classifier: the recipes of width on a model that names classes."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from billhook.anatomy import Anatomy, Inner, discover
from billhook.measure.channels import channels
from billhook.measure.class_slopes import class_slopes, entropy
from billhook.measure.cost import CostModel
from billhook.measure.patch import Reached, hooked, observing, stream_in
from billhook.measure.width import WidthTrace, units_of
from billhook.plan.address import Address
from billhook.plan.budget import Budget
from billhook.plan.errors import InputError
from billhook.plan.plan import Keep, Plan, Provenance
from billhook.plan.target import Target
from billhook.recipes import catalogue
from billhook.recipes.choices import BiMask, Evolve, GroupSparse, Widths
from billhook.recipes.schema import Recipe
from billhook.scores import Score, named
from billhook.search.bimask import bimask
from billhook.search.blind_widths import even_widths, random_widths
from billhook.search.entropy_widths import entropy_widths
from billhook.search.width import allocate, pose_width
from billhook.surgery import simulate

AT_ONCE = 128
MEASURED = ("weights", "channels", "slopes")  # of what scores look at, what images give


def narrow_classifier(
    model: Any,
    images: Tensor,
    *,
    budget: str | None = None,
    tolerance: float | None = None,
    recipe: str | os.PathLike[str] = "amp",
    unit: str | None = None,
    target: str = "remote",
    seed: int = 0,
) -> Plan:
    """The plan that makes an image classifier of transformers narrower by a recipe of width.

    ``images`` are what the model takes as ``pixel_values`` [n, channels, height, width]; no labels are needed. Either a
    ``budget`` is given (``flops=0.7``: those of one image), or, for recipes with a score, a ``tolerance``: then each
    sublayer becomes as narrow as the entropy of the model's own prediction allows (AMP, see ``entropy_widths``).
    ``unit`` says what goes instead of what the recipe says: ``neuron``, ``group`` (heads) or ``width``, both. Recipes
    whose allocation goes by the blocks of a language model (CFSP) are refused.

        plan = narrow_classifier(model, images, budget="flops=0.7")
        smaller = billhook.apply(model, billhook.discover(model), plan)

    Cost: about three forward passes over the images for slopes, one for activations, four over a batch a step for a
    bi-mask; a tolerance adds log2 of the number of units passes for each sublayer.
    """
    chosen = catalogue.load(recipe)
    if (budget is None) == (tolerance is None):
        raise InputError("give either a budget or a tolerance")
    kind = unit or chosen.unit
    choice = chosen.choice
    if not chosen.wide or kind not in ("neuron", "group", "width") or chosen.unit == "expert":
        raise InputError(f"recipe {chosen.name} does not narrow image classifiers: it works on {chosen.unit}s")
    if tolerance is not None and chosen.score is None:
        raise InputError(f"recipe {chosen.name} has no score to rank units by, which a tolerance needs: give a budget")
    if isinstance(choice, Widths) and choice.allocation == "shared":
        raise InputError(f"recipe {chosen.name} shares by how blocks of a language model turn the stream")
    if isinstance(choice, Evolve | GroupSparse) or (
        isinstance(choice, Widths) and (choice.screen is not None or choice.blocks is not None)
    ):
        raise InputError(
            f"recipe {chosen.name} looks at the next tokens of a language model, or drops whole blocks first"
        )
    if chosen.score is not None and named(chosen.score.word).needs not in MEASURED:
        raise InputError(f"recipe {chosen.name} has score {chosen.score.word}, which is measured on a language model")
    anatomy = discover(model)
    aim = Target(target)
    limits = Budget.parse(budget or "params=0.999")  # with a tolerance only what may go matters
    multiple = choice.multiple_of if isinstance(choice, Widths) else 1
    costs = CostModel(anatomy.outline, prompt_tokens=tokens_of(model, anatomy, images), new_tokens=0)
    problem = pose_width(anatomy.outline, limits, kind, aim, multiple_of=multiple, costs=costs)
    units = units_of(anatomy, kind, [space.address for space in problem.spaces])
    batches = [{"pixel_values": part} for part in torch.split(images.to(model.device), AT_ONCE)]
    keeps: tuple[Keep, ...]
    if isinstance(choice, BiMask):
        figures, _ = bimask(model, problem, units, batches, steps=choice.steps)
        keeps, _ = allocate(problem, figures, "global")
    elif not isinstance(choice, Widths):
        keeps, _ = random_widths(problem, seed) if choice.word == "random" else even_widths(problem)
    else:
        scores = _scores(chosen, model, anatomy, units, batches)
        if tolerance is not None:
            keeps = entropy_widths(problem.spaces, scores, partial(_entropy, model, anatomy, batches), tolerance)
        else:
            keeps, _ = allocate(problem, scores, choice.allocation, per=choice.per)
    plan = Plan.of([], aim, keeps)
    return plan.model_copy(update={"budget": budget, "provenance": Provenance(recipe=chosen.name, seed=seed)})


def tokens_of(model: Any, anatomy: Anatomy, images: Tensor) -> int:
    """How many tokens an image becomes, by which its FLOPs are counted."""
    seen: list[int] = []

    def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.append(stream_in(*args, **kwargs).shape[1])
        raise Reached

    first = model.get_submodule(anatomy.stacks[0].blocks[0].path)
    with observing(model), hooked([(first, look)]), suppress(Reached):
        model(pixel_values=images[:1].to(model.device))
    return seen[0]


def _scores(
    recipe: Recipe, model: Any, anatomy: Anatomy, units: dict[Address, Inner], batches: list[dict[str, Tensor]]
) -> dict[Address, Tensor]:
    score: Score = named(recipe.score.word if recipe.score else "")
    if score.needs == "channels":
        trace = WidthTrace.of(model, units, channels=channels(model, anatomy, batches))
    elif score.needs == "slopes":
        if score.check(recipe.score_parameters)["answer"] != "entropy":
            raise InputError(f"recipe {recipe.name} asks for the next token; a classifier has the entropy (amp)")
        trace = WidthTrace.of(model, units, slopes=class_slopes(model, anatomy, units, batches))
    else:
        trace = WidthTrace.of(model, units)
    return score(trace, anatomy, **recipe.score_parameters)


def _entropy(model: Any, anatomy: Anatomy, batches: list[dict[str, Tensor]], keeps: tuple[Keep, ...]) -> float:
    """The mean entropy of the narrowed model's prediction, in nats."""
    with simulate(model, anatomy, Plan.of([], keeps=keeps)), observing(model):
        total = sum(float(entropy(model(**batch).logits).sum(dtype=torch.float64)) for batch in batches)
    return total / sum(len(batch["pixel_values"]) for batch in batches)
