"""What a recipe whose act is to flatten needs of a model, and which blocks it may give up."""

from __future__ import annotations

from collections.abc import Mapping

from billhook.heal.combining.side_by_side import pairs
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.recipes.opened import Opened
from billhook.recipes.schema import Recipe


def require_flattening(recipe: Recipe, model: Opened) -> None:
    """InputError where no two neighbouring blocks of a model can become one."""
    if recipe.act == "flatten":
        try:
            pairs(model.model, model.anatomy, model.anatomy.stack("decoder"))
        except InputError as error:
            raise InputError(f"recipe {recipe.name} finds no two blocks that can become one: {error}") from error


def paired(scores: Mapping[Address, float], model: Opened) -> dict[Address, float]:
    """The scores of those that may go, each into the block behind it: of pairs that share a block the one whose first
    has the lower score, so that nothing is flattened twice."""
    firsts = set(pairs(model.model, model.anatomy, model.anatomy.stack("decoder")))
    found: dict[Address, float] = {}
    for unit in sorted(scores, key=lambda unit: (scores[unit], unit)):
        beside = {Address(unit.stack, unit.block + step) for step in (-1, 1)}
        if unit.block in firsts and not beside & found.keys():
            found[unit] = scores[unit]
    return found
