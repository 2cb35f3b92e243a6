"""From the words of a recipe to the inner units that stay, and to the blocks that go before."""

from __future__ import annotations

from collections.abc import Callable

from billhook.data import Windows
from billhook.measure.channels import channels
from billhook.measure.sensitivity import sensitivity
from billhook.measure.sums import Trace
from billhook.measure.width import WidthTrace, units_of
from billhook.plan.address import Address
from billhook.plan.budget import realised
from billhook.plan.check import units
from billhook.plan.plan import Keep
from billhook.plan.record import SearchRecord, Step
from billhook.recipes.opened import Opened
from billhook.recipes.schema import Recipe, Widths
from billhook.recipes.scored import scored
from billhook.scores import named
from billhook.search.coarse import coarse
from billhook.search.shares import sigmoid_shares
from billhook.search.width import WidthProblem, allocate

Progress = Callable[[str, int, int], None]


def narrow(
    recipe: Recipe,
    model: Opened,
    problem: WidthProblem,
    windows: Windows,
    seen: Trace,
    *,
    seed: int,
    progress: Progress | None,
) -> tuple[frozenset[Address], tuple[Keep, ...], SearchRecord, dict[str, dict[str, float]]]:
    """Carry out the choice of a recipe of width: the blocks that went before, what is kept, its record, the mean score
    in each sublayer and that of the blocks. ``seen`` is the trace of the dense model over the calibration."""
    choice = recipe.choice
    assert isinstance(choice, Widths)
    steps: tuple[Step, ...] = ()
    importance: dict[str, dict[str, float]] = {}
    before = 0
    if choice.blocks is not None:
        blocks = units(problem.outline, "block")
        figures, before = scored(choice.blocks.score, "block", model, blocks, windows, seen, progress)
        steps, problem = coarse(problem, figures, choice.blocks.share, before)
        importance[f"{choice.blocks.score.word} of a block"] = {str(unit): figures[unit] for unit in sorted(figures)}
    score = named(recipe.score.word if recipe.score else "")
    trace = _measured(recipe, model, problem, windows, seed, progress)
    scores = score(trace, model.anatomy, **recipe.score_parameters)
    shares, work = None, before + trace.work
    if choice.steepness is not None:
        turned = {stack: seen.angular(stack)[0] for stack in seen.angles}
        distances = {space.address: turned[space.address.stack][space.address.block] for space in problem.spaces}
        shares = sigmoid_shares(distances, problem.share, choice.steepness)
        work += seen.work
    keeps, costs = allocate(problem, scores, choice.allocation, per=choice.per, shares=shares)
    narrowed = tuple(str(keep.unit) for keep in keeps)
    last = Step(units=narrowed, score=None, objective=None, realised=realised(costs, problem.dense), work=work)
    record = SearchRecord(recipe=recipe.name, objective=score.name, steps=(*steps, last), work=work, evaluations=0)
    means = {str(address): scores[address].mean().item() for address in scores}
    importance[f"mean {score.name} of a {recipe.unit if recipe.unit != 'width' else 'unit'}"] = means
    drops = frozenset(Address.parse(unit) for step in steps for unit in step.units)
    return drops, keeps, record, importance


def _measured(
    recipe: Recipe, model: Opened, problem: WidthProblem, windows: Windows, seed: int, progress: Progress | None
) -> WidthTrace:
    """What the score of a recipe looks at, and nothing else."""
    live, anatomy = model.model, model.anatomy
    units = units_of(anatomy, recipe.unit, dict.fromkeys(space.address for space in problem.spaces))
    score = named(recipe.score.word if recipe.score else "")
    work = windows.tokens * sum(len(stack.blocks) for stack in anatomy.stacks)
    match score.needs:
        case "channels":
            return WidthTrace.of(live, units, channels=channels(live, anatomy, windows, progress), work=work)
        case "slopes":
            answer = score.check(recipe.score_parameters)["answer"]
            slopes = sensitivity(live, anatomy, units, windows, answer, seed=seed, progress=progress)
            return WidthTrace.of(live, units, slopes=slopes, work=3 * work)
    return WidthTrace.of(live, units)
