"""What a recipe whose act is to share needs of a model and of a budget."""

from __future__ import annotations

from billhook.anatomy.visits import require_sharable
from billhook.plan.budget import Budget
from billhook.plan.errors import InputError
from billhook.recipes.opened import Opened
from billhook.recipes.schema import Recipe
from billhook.surgery.form import read_form

SAVED = ("params", "size")


def require_sharing(recipe: Recipe, model: Opened, budget: Budget) -> None:
    """InputError where shared weights cannot meet the budget, or not be saved once."""
    if recipe.act != "share":
        return
    kinds = [limit.kind for limit in budget.limits if limit.kind not in SAVED]
    if kinds:
        raise InputError(
            f"budget {budget}: blocks that share weights run all the same, which saves no {kinds[0]}; recipe "
            f"{recipe.name} takes budgets of {' and '.join(SAVED)}"
        )
    form = read_form(model.model.config, model.anatomy)
    if form.ranks or form.biases:
        raise InputError(
            f"{model.loaded.source} has linears in two parts or added biases; its blocks cannot share weights"
        )
    stack = model.anatomy.stack("decoder")
    require_sharable(model.model, stack, [*range(len(stack.blocks))] * 2)
