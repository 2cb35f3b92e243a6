"""What is asked of a cut, settled before anything is measured: recipe, target, way to heal; or why it cannot be."""

from __future__ import annotations

import os
from collections.abc import Sequence

from billhook.heal import require_healable
from billhook.heal.combining.gains import require_gains
from billhook.heal.refit.mask_tuning import NOTHING
from billhook.plan.budget import Budget
from billhook.plan.errors import InputError
from billhook.plan.heals import TRAINED, Heal
from billhook.plan.outline import Outline
from billhook.plan.plan import Plan
from billhook.plan.target import Target
from billhook.recipes import catalogue
from billhook.recipes.choices import BiMask, Evolve, GroupSparse
from billhook.recipes.find import Task, pose_for, require_cut
from billhook.recipes.flattening import require_flattening
from billhook.recipes.learned_weights import require_prior
from billhook.recipes.opened import Opened
from billhook.recipes.schema import Recipe
from billhook.recipes.sharing import require_sharing
from billhook.recipes.weights import require_weights


def way_of(recipe: Recipe, heal: Heal | None) -> str:
    """Where the new weights of what is left come from: the act of a recipe that combines blocks, or a way to heal."""
    if recipe.unit == "weight":
        if heal not in (None, "none", "eora", "tune"):
            raise InputError(
                f"--heal {heal} would fill the zeros of recipe {recipe.name} again; take eora, tune or none"
            )
        return heal or recipe.heal
    if heal == "eora":
        raise InputError(
            f"--heal eora puts paths beside linears that lost single weights; recipe {recipe.name} takes none"
        )
    if heal == "bridge":
        raise InputError(
            "--heal bridge adds parameters that the budget would have to know before; cut with --target remote and "
            "--heal none, then run billhook heal DIR --method bridge"
        )
    if (recipe.trains or recipe.learns_ranks) and heal not in (None, "none"):
        raise InputError(f"recipe {recipe.name} trains what is left itself; leave out --heal {heal}")
    if heal == "scales" and not recipe.wide:
        raise InputError(f"recipe {recipe.name} drops {recipe.unit}s: {NOTHING}")
    if recipe.act == "drop":
        return heal or recipe.heal
    if recipe.act == "share":
        if heal not in (None, "none"):
            raise InputError(f"recipe {recipe.name} has blocks share weights, which --heal {heal} would part again")
        return "none"
    if heal not in (None, "none"):
        raise InputError(f"recipe {recipe.name} makes new weights itself (act {recipe.act}); leave out --heal {heal}")
    return recipe.act


def require_fitting(
    recipe: Recipe, way: str, target: Target, budget: Budget, prior: Plan | None, model: Opened
) -> None:
    """InputError for what a recipe, a way to heal and a target cannot make of a model together, before anything is
    measured."""
    if way != "none" and (recipe.act, recipe.unit) != ("merge", "neuron"):  # those go by the weights alone
        require_healable(model.anatomy)
    if way == "gains":
        require_gains(model.anatomy)
    require_sharing(recipe, model, budget)
    require_flattening(recipe, model)
    require_weights(recipe, model)
    if prior is not None:
        require_prior(prior, model)
    if way in ("bias", "data-free", "scales") and not recipe.wide:
        raise InputError(f"--heal {way} makes up for units inside sublayers, and recipe {recipe.name} takes none away")
    if way == "bias" and target in (Target.UNIFORM, Target.DECI):
        raise InputError(f"--heal bias gives linears a bias of their own, which target {target} cannot carry")
    if recipe.unit == "channel" and way not in ("none", "closed-form"):
        raise InputError(f"recipe {recipe.name} cuts hidden channels, which --heal {way} knows nothing of")
    if recipe.unit == "linear" and way in TRAINED:
        raise InputError(
            f"recipe {recipe.name} leaves linears in two parts, which --heal {way} cannot train; take closed-form"
        )


def posed_first(candidates: Sequence[Recipe], outline: Outline, budget: Budget, target: Target) -> tuple[Recipe, Task]:
    """The first recipe that can meet the budget on this model, and the task it has. InputError of the last one where
    none can."""
    *others, last = candidates
    for recipe in others:
        try:
            return recipe, pose_for(recipe, outline, budget, target)
        except InputError:
            continue
    return last, pose_for(last, outline, budget, target)


def settled(
    recipe: str | os.PathLike[str] | None, target: str | None, budget: Budget
) -> tuple[tuple[Recipe, ...], Target]:
    """The recipes that may be taken and the target, each following from the other where only one is given."""
    aim = Target(target) if target is not None else None
    if recipe is None:
        names = catalogue.DEFAULTS_UNIFORM if aim is Target.UNIFORM else catalogue.DEFAULTS
        recipes = [catalogue.load(name) for name in names]
        if budget.until_cliff:  # width has no path of single steps
            recipes = [recipe for recipe in recipes if not recipe.wide]
        return tuple(recipes), aim or Target.REMOTE
    chosen = catalogue.load(recipe)
    require_cut(chosen)
    aim = aim or chosen.aim
    if aim in (Target.UNIFORM, Target.DECI) and chosen.act == "share":
        raise InputError(
            f"recipe {chosen.name} has blocks share weights, which target {aim} cannot carry; use target remote or any"
        )
    if aim is Target.UNIFORM and chosen.wide:
        if (
            isinstance(chosen.choice, BiMask | GroupSparse | Evolve)
            or getattr(chosen.choice, "allocation", "uniform") != "uniform"
        ):
            raise InputError(
                f"recipe {chosen.name} leaves different widths, which target uniform cannot carry; use target "
                f"remote, or a recipe whose allocation is uniform"
            )
    elif aim is Target.UNIFORM and chosen.unit not in ("block", "weight", "channel"):
        raise InputError(
            f"recipe {chosen.name} drops {chosen.unit}s, which target uniform cannot carry: an ordinary checkpoint has "
            f"the same sublayers in every block; use target remote, or a recipe of whole blocks"
        )
    return (chosen,), aim
