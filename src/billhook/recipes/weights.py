"""From the words of a recipe to the single weights that go."""

from __future__ import annotations

from collections.abc import Callable

from billhook.data import Windows
from billhook.measure.cost import cost
from billhook.plan.budget import realised
from billhook.plan.masks import parse_pattern
from billhook.plan.record import SearchRecord, Step
from billhook.recipes.opened import Opened
from billhook.recipes.schema import Masks, Recipe
from billhook.search.sparsity import Sparse, WeightProblem, require_sparsifiable, sparsify
from billhook.search.zeroth_order import sparsities, zeroth_order

Progress = Callable[[str, int, int], None]


def require_weights(recipe: Recipe, model: Opened) -> None:
    """InputError for a recipe of single weights that this model does not allow, before anything is measured."""
    choice = recipe.choice
    if isinstance(choice, Masks):
        pattern = parse_pattern(choice.pattern)
        require_sparsifiable(model.model, model.anatomy, "decoder", by=choice.by, pattern=pattern)


def thin(
    recipe: Recipe, model: Opened, problem: WeightProblem, windows: Windows, *, seed: int, progress: Progress | None
) -> tuple[Sparse, SearchRecord, dict[str, dict[str, float]]]:
    """Carry out the choice of a recipe of single weights: what goes, its record, and what was found of blocks and
    sublayers."""
    choice = recipe.choice
    assert isinstance(choice, Masks)
    outline = problem.outline
    sizes = {
        i: sum(sublayer.linear_params for sublayer in block.sublayers.values())
        for i, block in enumerate(outline.stack(problem.stack).blocks)
    }
    shares, work = dict.fromkeys(sizes, problem.share), 0
    importance: dict[str, dict[str, float]] = {}
    if choice.allocation == "zeroth-order":
        slopes, work = zeroth_order(model.model, model.anatomy, problem.stack, windows, seed=seed, progress=progress)
        shares = sparsities(slopes, sizes, problem.share)
        importance["slope of the loss by noise"] = {f"{problem.stack}.{i}": slope for i, slope in slopes.items()}
    sparse = sparsify(
        model.model,
        model.anatomy,
        problem.stack,
        shares,
        windows,
        by=choice.by,
        pattern=parse_pattern(choice.pattern),
        progress=progress,
    )
    zeros = {edit.unit: sum(edit.zeros.values()) for edit in sparse.edits}
    step = Step(
        units=tuple(str(edit.unit) for edit in sparse.edits),
        score=None,
        objective=None,
        realised=realised(cost(outline, zeros=zeros), problem.dense),
        work=work + sparse.work,
    )
    record = SearchRecord(
        recipe=recipe.name, objective=choice.by, steps=(step,), work=work + sparse.work, evaluations=0
    )
    importance[f"mean {choice.by} of a weight"] = {str(unit): value for unit, value in sorted(sparse.saliency.items())}
    return sparse, record, importance
