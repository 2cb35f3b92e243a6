"""From the words of a recipe to the single weights that go."""

from __future__ import annotations

from collections.abc import Callable

from billhook.data import Windows
from billhook.measure.cost import cost
from billhook.plan.budget import realised
from billhook.plan.masks import parse_pattern
from billhook.plan.plan import Plan
from billhook.plan.record import SearchRecord, Step
from billhook.recipes.choices import LearnedMasks, Masks, SparseTraining
from billhook.recipes.learned_weights import learned_weights
from billhook.recipes.opened import Opened
from billhook.recipes.schema import OBJECTIVES, Recipe
from billhook.search.sparsity import Sparse, WeightProblem, require_sparsifiable, sparsify
from billhook.search.zeroth_order import sparsities, zeroth_order

Progress = Callable[[str, int, int], None]


def require_weights(recipe: Recipe, model: Opened) -> None:
    """InputError for a recipe of single weights that this model does not allow, before anything is measured."""
    choice = recipe.choice
    if isinstance(choice, Masks | LearnedMasks | SparseTraining):
        pattern = parse_pattern(choice.pattern)
        by = "magnitude" if isinstance(choice, SparseTraining) else choice.by
        require_sparsifiable(model.model, model.anatomy, "decoder", by=by, pattern=pattern)


def thin(
    recipe: Recipe,
    model: Opened,
    problem: WeightProblem,
    windows: Windows,
    survey: Windows,
    lessons: Windows,
    prior: Plan | None,
    *,
    seed: int,
    progress: Progress | None,
) -> tuple[Sparse, SearchRecord, dict[str, dict[str, float]]]:
    """Carry out the choice of a recipe of single weights: what goes, its record, and what was found of blocks and
    sublayers. Masks rest on the statistics of ``survey``; what is trained reads ``lessons``, and begins with the masks
    of ``prior`` where there is one."""
    choice = recipe.choice
    assert isinstance(choice, Masks | LearnedMasks | SparseTraining)
    outline = problem.outline
    importance: dict[str, dict[str, float]] = {}
    blocks = outline.stack(problem.stack).blocks
    shares, work, held = dict.fromkeys(range(len(blocks)), problem.share), 0, None
    if isinstance(choice, Masks):
        if choice.allocation == "zeroth-order":
            slopes, work = zeroth_order(
                model.model, model.anatomy, problem.stack, windows, seed=seed, progress=progress
            )
            sizes = {i: sum(s.linear_params for s in block.sublayers.values()) for i, block in enumerate(blocks)}
            shares = sparsities(slopes, sizes, problem.share)
            importance["slope of the loss by noise"] = {f"{problem.stack}.{i}": slope for i, slope in slopes.items()}
        sparse = sparsify(
            model.model,
            model.anatomy,
            problem.stack,
            shares,
            survey,
            by=choice.by,
            pattern=parse_pattern(choice.pattern),
            progress=progress,
        )
        mean = {str(unit): value for unit, value in sorted(sparse.saliency.items())}
        importance[f"mean {choice.by} of a weight"] = mean
    else:
        sparse, held = learned_weights(recipe, model, problem, windows, lessons, prior, seed=seed, progress=progress)
    zeros = {edit.unit: sum(edit.zeros.values()) for edit in sparse.edits}
    step = Step(
        units=tuple(str(edit.unit) for edit in sparse.edits),
        score=None,
        objective=held,
        realised=realised(cost(outline, zeros=zeros), problem.dense),
        work=work + sparse.work,
    )
    objective = choice.by if isinstance(choice, Masks) else OBJECTIVES[recipe.objective or "kl"]
    record = SearchRecord(recipe=recipe.name, objective=objective, steps=(step,), work=step.work, evaluations=0)
    return sparse, record, importance
