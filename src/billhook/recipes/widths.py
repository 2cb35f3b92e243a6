"""From the words of a recipe to the inner units that stay, and to the blocks that go before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from billhook.data import Windows
from billhook.heal import Healing
from billhook.measure.ablation import Ablator
from billhook.measure.batches import batches_of
from billhook.measure.channels import channels
from billhook.measure.cost import CostModel, Costs
from billhook.measure.knockout import knockout
from billhook.measure.lora_slopes import lora_slopes
from billhook.measure.routing import routing
from billhook.measure.sensitivity import sensitivity
from billhook.measure.sums import Trace
from billhook.measure.width import WidthTrace, units_of
from billhook.plan.address import Address
from billhook.plan.budget import realised
from billhook.plan.check import units
from billhook.plan.plan import Keep
from billhook.plan.record import SearchRecord, Step
from billhook.recipes.choices import BiMask, Evolve, GroupSparse, Widths
from billhook.recipes.learned_weights import goal_of
from billhook.recipes.once import Once
from billhook.recipes.opened import Opened
from billhook.recipes.schema import OBJECTIVES, Recipe
from billhook.recipes.scored import scored
from billhook.recipes.searched import evolved_widths
from billhook.scores import named
from billhook.search.bimask import bimask
from billhook.search.blind_widths import even_widths, random_widths
from billhook.search.coarse import coarse
from billhook.search.exchanged import Exchanged
from billhook.search.group_sparse import group_sparse, names_of
from billhook.search.levels import levels_of, prices
from billhook.search.shares import sigmoid_shares
from billhook.search.width import WidthProblem, allocate

Progress = Callable[[str, int, int], None]


def narrow(
    recipe: Recipe,
    model: Opened,
    problem: WidthProblem,
    windows: Windows,
    survey: Windows,
    seen: Trace,
    once: Once,
    *,
    seed: int,
    place: Path,
    progress: Progress | None,
) -> tuple[frozenset[Address], tuple[Keep, ...], SearchRecord, dict[str, dict[str, float]]]:
    """Carry out the choice of a recipe of width: the blocks that went before, what is kept, its record, the mean score
    in each sublayer and that of the blocks. ``seen`` is the trace of the dense model over the calibration ``windows``;
    the score reads ``survey``. Statistics that ``once`` knows already cost nothing."""
    choice = recipe.choice
    if isinstance(choice, BiMask):
        inner = units_of(model.anatomy, recipe.unit, dict.fromkeys(space.address for space in problem.spaces))
        batches = list(batches_of(windows, model.model, tokens_at_once=1))
        scores, passes = bimask(model.model, problem, inner, batches, steps=choice.steps, progress=progress)
        keeps, costs = allocate(problem, scores, "global")
        work = passes * windows.ids.shape[1] * sum(len(stack.blocks) for stack in model.anatomy.stacks)
        return frozenset(), keeps, _record(recipe, problem, keeps, costs, "bi-mask", work), {}
    if not isinstance(choice, Widths | Evolve):
        keeps, costs = random_widths(problem, seed) if choice.word == "random" else even_widths(problem)
        return frozenset(), keeps, _record(recipe, problem, keeps, costs, "none", 0), {}
    steps: tuple[Step, ...] = ()
    importance: dict[str, dict[str, float]] = {}
    before = 0
    if isinstance(choice, Widths) and choice.blocks is not None:
        blocks = units(problem.outline, "block")
        blockwise = partial(scored, choice.blocks.score, "block", model, blocks, windows, seen, progress)
        figures, before = once("blocks", blockwise)
        steps, problem = coarse(problem, figures, choice.blocks.share, before)
        importance[f"{choice.blocks.score.word} of a block"] = {str(unit): figures[unit] for unit in sorted(figures)}
    score = named(recipe.score.word if recipe.score else "")
    trace = _measured(recipe, model, problem, survey, once, seed, progress)
    scores = score(trace, model.anatomy, **recipe.score_parameters)
    if recipe.unit != "expert":  # the shares of a mixture add up to one: their mean says nothing
        means = {str(address): scores[address].mean().item() for address in scores}
        importance[f"mean {score.name} of a {recipe.unit if recipe.unit != 'width' else 'unit'}"] = means
    if isinstance(choice, Evolve):
        kind = recipe.objective or "kl"
        keeps, value, paid, looks = evolved_widths(choice, problem, scores, windows, kind, model, place, seed, progress)
        costs = CostModel(problem.outline).of((), keeps)
        record = _record(recipe, problem, keeps, costs, OBJECTIVES[kind], trace.work + paid)
        (step,) = record.steps
        steps = (step.model_copy(update={"objective": value}),)
        return frozenset(), keeps, record.model_copy(update={"steps": steps, "evaluations": looks}), importance
    shares, work = None, before + trace.work
    if choice.steepness is not None:
        turned = {stack: seen.angular(stack)[0] for stack in seen.angles}
        distances = {space.address: turned[space.address.stack][space.address.block] for space in problem.spaces}
        shares = sigmoid_shares(distances, problem.share, choice.steepness)
        work += once("angular", lambda: (None, seen.work))[1]
    priced = None
    if choice.screen is not None:
        short = windows.share(choice.screen)
        levels = tuple((space.address, *levels_of(space)) for space in problem.spaces)
        priced, paid = once(("prices", levels), lambda: _prices(model, problem, scores, short, progress))
        work += paid
    keeps, costs = allocate(problem, scores, choice.allocation, per=choice.per, shares=shares, prices=priced)
    record = _record(recipe, problem, keeps, costs, score.name, work, steps)
    drops = frozenset(Address.parse(unit) for step in steps for unit in step.units)
    return drops, keeps, record, importance


def drive(
    recipe: Recipe, model: Opened, problem: WidthProblem, lessons: Windows, *, progress: Progress | None
) -> tuple[tuple[Keep, ...], SearchRecord, dict[str, dict[str, float]], Healing]:
    """Carry out a choice that drives units to zero while it trains on ``lessons``: what is kept, its record, the mean
    score in each sublayer, and the new weights of what is left."""
    choice = recipe.choice
    assert isinstance(choice, GroupSparse)
    inner = units_of(model.anatomy, recipe.unit, dict.fromkeys(space.address for space in problem.spaces))
    names = names_of(inner, dict(model.model.named_parameters()))
    goal = goal_of(recipe)
    held = Exchanged(model.model, model.anatomy, problem.spaces[0].address.stack, names, lessons, goal)
    found = group_sparse(held, problem, inner, steps=choice.steps, cycles=choice.cycles, progress=progress)
    means = {str(address): scores.mean().item() for address, scores in sorted(found.scores.items())}
    begun, best = found.looks[0].held, min(look.held for look in found.looks)
    record = _record(recipe, problem, found.keeps, found.costs, OBJECTIVES[goal], held.work)
    healing = Healing(found.weights, (), {}, lessons.tokens, 0)
    if goal == "kl":
        healing = replace(healing, cut=begun, healed=best)
    return found.keeps, record, {"mean score of a unit while candidates shrink": means}, healing


def _record(
    recipe: Recipe,
    problem: WidthProblem,
    keeps: tuple[Keep, ...],
    costs: Costs,
    objective: str,
    work: int,
    before: tuple[Step, ...] = (),
) -> SearchRecord:
    """One step more: a choice of width is made at once."""
    narrowed = tuple(str(keep.unit) for keep in keeps)
    step = Step(units=narrowed, score=None, objective=None, realised=realised(costs, problem.dense), work=work)
    return SearchRecord(recipe=recipe.name, objective=objective, steps=(*before, step), work=work, evaluations=0)


def _prices(
    model: Opened, problem: WidthProblem, scores: Mapping[Address, Tensor], windows: Windows, progress: Progress | None
) -> tuple[dict[Address, Tensor], int]:
    """With the work behind them."""
    ablator = Ablator(model.model, model.anatomy, windows, "kl", progress=progress)
    return prices(problem, scores, ablator.narrowed, progress), ablator.work


def _measured(
    recipe: Recipe,
    model: Opened,
    problem: WidthProblem,
    windows: Windows,
    once: Once,
    seed: int,
    progress: Progress | None,
) -> WidthTrace:
    """What the score of a recipe looks at, and nothing else."""
    live, anatomy = model.model, model.anatomy
    units = units_of(anatomy, recipe.unit, dict.fromkeys(space.address for space in problem.spaces))
    score = named(recipe.score.word if recipe.score else "")
    one = windows.tokens * sum(len(stack.blocks) for stack in anatomy.stacks)  # the work of a pass
    asked = tuple(units)  # not all, where blocks went before
    match score.needs:
        case "channels":
            given, work = once("channels", lambda: (channels(live, anatomy, windows, progress), one))
            return WidthTrace.of(live, units, channels=given, work=work)
        case "slopes":
            answer = score.check(recipe.score_parameters)["answer"]
            slopes, work = once(
                asked,
                lambda: (sensitivity(live, anatomy, units, windows, answer, seed=seed, progress=progress), 3 * one),
            )
            return WidthTrace.of(live, units, slopes=slopes, work=work)
        case "knockouts":
            by = score.check(recipe.score_parameters)["by"]
            passes = 1 + sum(inner.count for inner in units.values())
            rises, work = once(asked, lambda: (knockout(live, anatomy, units, windows, by, progress), passes * one))
            return WidthTrace.of(live, units, knockouts=rises, work=work)
        case "adapters":
            importance, work = once(
                asked, lambda: (lora_slopes(live, anatomy, units, windows, seed=seed, progress=progress), 3 * one)
            )
            return WidthTrace(units, importance, work=work)
        case "routing":
            routed, work = once(asked, lambda: (routing(live, anatomy, units, windows, progress), one))
            return WidthTrace.of(live, units, routing=routed, work=work)
    return WidthTrace.of(live, units)
