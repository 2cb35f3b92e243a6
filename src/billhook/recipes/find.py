"""From the words of a recipe to the units that go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from billhook import search
from billhook.data import Windows
from billhook.heal import Healing
from billhook.measure.ablation import Kind
from billhook.measure.sums import Trace
from billhook.plan.arrays import Arrays
from billhook.plan.budget import Budget, realised
from billhook.plan.errors import InputError
from billhook.plan.outline import Outline
from billhook.plan.plan import Factorise, HiddenChannels, Keep, Plan, Sparsify
from billhook.plan.record import SearchRecord
from billhook.plan.schedule import Schedule
from billhook.plan.target import Target
from billhook.recipes.channels import choose_channels
from billhook.recipes.choices import (
    Bandit,
    Evolve,
    Greedy,
    GroupSparse,
    Knapsack,
    LearnedMasks,
    Masks,
    OneShot,
    Ranks,
    Sampled,
    Span,
    SparseTraining,
    Thinned,
    Trained,
    Widths,
)
from billhook.recipes.flattening import paired, require_flattening
from billhook.recipes.learned import learned
from billhook.recipes.once import Once
from billhook.recipes.opened import Opened
from billhook.recipes.ranks import Bases, take_apart
from billhook.recipes.schema import OBJECTIVES, Recipe
from billhook.recipes.scored import scored
from billhook.recipes.searched import evolved, greedily, memo_of
from billhook.recipes.sharing import require_sharing
from billhook.recipes.weights import thin
from billhook.recipes.widths import drive, narrow
from billhook.search import Found, Problem
from billhook.search.apart import apart, eased
from billhook.search.channels import ChannelProblem, pose_channels
from billhook.search.ranks import RankProblem, pose_ranks
from billhook.search.sparsity import WeightProblem, pose_weights
from billhook.search.width import WidthProblem, pose_width

Progress = Callable[[str, int, int], None]
LEARNED = {"gates": "trained gate", "sampled-masks": "logit of being kept", "bandit": "worth of not being skipped"}
BASELINES: dict[str, Callable[..., Found]] = {
    "random": search.at_random,
    "evenly-spaced": search.evenly_spaced,
    "evenly-kept": search.evenly_kept,
    "first": search.first,
    "last": search.last,
}


@dataclass(frozen=True)
class Choice:
    """What a recipe chose, and the importance of each unit as far as the recipe looked at it (high is important);
    ``keeps`` of the sublayers that get narrower, ``channels`` of the stream, ``sparsities`` of those that lose single
    weights, with their ``arrays``, ``bases`` of the linears that become two, mixtures whose experts are taken
    ``apart``, and the ``schedule`` by which blocks run with the weights of others (those are not among the drops);
    ``healing``: new weights that came with the choice."""

    found: Found
    record: SearchRecord
    importance: dict[str, dict[str, float]]
    keeps: tuple[Keep, ...] = ()
    sparsities: tuple[Sparsify, ...] = ()
    arrays: Arrays = field(default_factory=Arrays)
    bases: Bases = field(default_factory=dict)
    apart: tuple[Factorise, ...] = ()
    schedule: Schedule | None = None
    healing: Healing | None = field(default=None, compare=False)
    channels: tuple[HiddenChannels, ...] = ()

    def plan(self, target: Target) -> Plan:
        """What the recipe found, as a plan."""
        whole = Plan.of(self.found.drops, target, self.keeps, self.sparsities, self.arrays, self.channels)
        plan = whole.factorised(self.bases)
        return plan.model_copy(update={"schedule": self.schedule, "edits": (*plan.edits, *self.apart)})


Task = Problem | WidthProblem | WeightProblem | RankProblem | ChannelProblem


def pose_for(recipe: Recipe, outline: Outline, budget: Budget, target: Target) -> Task:
    """The task that a recipe solves, for the decoder. InputError where it has no solution."""
    if isinstance(recipe.choice, Masks | LearnedMasks | SparseTraining):
        return pose_weights(outline, budget)
    if recipe.unit == "channel":
        multiple = recipe.choice.multiple_of if isinstance(recipe.choice, Thinned) else 1
        return pose_channels(outline, budget, target, stack="decoder", multiple_of=multiple)
    if recipe.wide:
        if target in (Target.UNIFORM, Target.DECI) and getattr(recipe.choice, "apart", None) is not None:
            raise InputError(f"target {target} cannot carry experts in two parts; use target remote or any")
        multiple = recipe.choice.multiple_of if isinstance(recipe.choice, Widths) else 1
        return pose_width(outline, budget, recipe.unit, target, stack="decoder", multiple_of=multiple)
    if isinstance(recipe.choice, Ranks):
        return pose_ranks(outline, budget, target, stack="decoder")
    return search.pose(outline, budget, recipe.unit, target, stack="decoder")


def find(
    recipe: Recipe,
    model: Opened,
    problem: Task,
    windows: Windows,
    seen: Trace,
    *,
    seed: int,
    place: Path,
    progress: Progress | None,
    survey: Windows | None = None,
    lessons: Windows | None = None,
    prior: Plan | None = None,
    once: Once | None = None,
) -> Choice:
    """Carry out the choice of a recipe. ``seen`` is the trace of the dense model over the calibration ``windows``.
    Statistics that one pass gives are taken of ``survey`` (see ``Recipe.surveys``), and a choice that is trained reads
    ``lessons``, the calibration where there are none; it begins with the masks of ``prior`` where there is one. Several
    searches of one recipe on the same text that are given the same ``once`` share what their budgets do not change.

    A greedy or evolutionary search writes every finished evaluation to a ledger in the folder ``place``, and goes on
    from there when it is run again on the same things. The work of the trace counts where the choice rests on it. With
    the budget ``until=cliff`` a one-shot choice looks at the divergence from the dense model along its path, and a
    greedy one makes no exchanges afterwards.
    """
    require_path(recipe, problem.budget)
    require_sharing(recipe, model, problem.budget)
    require_flattening(recipe, model)
    choice = recipe.choice
    once = once or Once()
    survey = survey if survey is not None and recipe.surveys else windows
    if isinstance(problem, WeightProblem):
        sparse, record, mean = thin(
            recipe, model, problem, windows, survey, lessons or windows, prior, seed=seed, progress=progress
        )
        return Choice(
            _no_drops(record), record, mean, sparsities=sparse.edits, arrays=sparse.arrays, healing=sparse.healing
        )
    if isinstance(problem, WidthProblem) and isinstance(choice, GroupSparse):
        keeps, record, importance, healing = drive(recipe, model, problem, lessons or windows, progress=progress)
        return Choice(_no_drops(record), record, importance, keeps, healing=healing)
    if isinstance(problem, WidthProblem):
        return _narrowed(recipe, model, problem, windows, survey, seen, once, seed, place, progress)
    if isinstance(problem, ChannelProblem):
        edit, record, importance = choose_channels(recipe, model, problem, survey, once, seed=seed, progress=progress)
        return Choice(_no_drops(record), record, importance, channels=(edit,))
    if isinstance(problem, RankProblem):
        bases, record, importance, new = take_apart(recipe, model, problem, survey, once, seed=seed, progress=progress)
        return Choice(_no_drops(record), record, importance, bases=bases, healing=new)
    return _dropped(recipe, model, problem, windows, seen, once, seed, place, progress)


def _no_drops(record: SearchRecord) -> Found:
    return Found(frozenset(), record.steps, record.work, 0)


def _dropped(
    recipe: Recipe,
    model: Opened,
    problem: Problem,
    windows: Windows,
    seen: Trace,
    once: Once,
    seed: int,
    place: Path,
    progress: Progress | None,
) -> Choice:
    """Whole blocks or sublayers go."""
    choice = recipe.choice
    objective = recipe.objective
    importance: dict[str, dict[str, float]] = {}
    memo = partial(memo_of, recipe.objective or "kl", model, place, progress)
    match choice:
        case Greedy():
            found, rises = greedily(choice, problem, windows, memo, progress)
            importance[f"rise of {_objective(recipe, objective)} if dropped"] = {
                str(u): rise for u, rise in rises.items()
            }
        case Evolve():
            found = evolved(choice, problem, windows, memo, seed, progress)
        case Trained() | Sampled() | Bandit():
            found, worth = learned(choice, model, problem, windows, seed=seed, progress=progress)
            importance[LEARNED[choice.word]] = {str(u): value for u, value in sorted(worth.items())}
        case OneShot() | Knapsack():
            assert recipe.score is not None
            units = problem.candidates
            score = partial(scored, recipe.score, recipe.unit, model, units, windows, seen, progress)
            scores, work = once(units, score)
            scores = paired(scores, model) if recipe.act == "flatten" else scores
            if isinstance(choice, Knapsack):
                found = search.knapsack(problem, scores, work=work)
            elif problem.budget.until_cliff:
                objective = "kl"
                full = memo(windows)
                found = search.ranked_until_cliff(problem, scores, full, per=choice.per, work=work, progress=progress)
            else:
                found = search.one_shot(problem, scores, per=choice.per, work=work)
        case Span():
            angular = {name: seen.angular(name) for name in seen.angles}
            _, work = once("angular", lambda: (None, seen.work))
            found = search.span(problem, angular, work=work)
        case _:
            found = _baseline(choice.word, problem, seed)
    schedule = None
    if recipe.act == "share":
        found, schedule = search.share(model.model, model.anatomy, found, windows, progress)
    record = SearchRecord(
        recipe=recipe.name,
        objective=_objective(recipe, objective),
        steps=found.steps,
        work=found.work,
        evaluations=found.evaluations,
    )
    return Choice(found, record, importance, schedule=schedule)


def _narrowed(
    recipe: Recipe,
    model: Opened,
    problem: WidthProblem,
    windows: Windows,
    survey: Windows,
    seen: Trace,
    once: Once,
    seed: int,
    place: Path,
    progress: Progress | None,
) -> Choice:
    share = recipe.choice.apart if isinstance(recipe.choice, Widths) else None
    whole = problem if share is None else eased(problem, 1 - share)
    drops, keeps, record, importance = narrow(
        recipe, model, whole, windows, survey, seen, once, seed=seed, place=place, progress=progress
    )
    edits: tuple[Factorise, ...] = ()
    if share is not None:
        edits, costs = apart(problem, keeps)
        (*_, last) = record.steps
        last = last.model_copy(update={"realised": realised(costs, problem.dense)})
        record = record.model_copy(update={"steps": (*record.steps[:-1], last)})
    found = Found(drops, record.steps, record.work, record.evaluations)
    return Choice(found, record, importance, keeps, apart=edits)


def require_cut(recipe: Recipe) -> None:
    """InputError for a recipe that cuts nothing, which no budget asks for."""
    if recipe.returns:
        raise InputError(
            f"recipe {recipe.name} takes a model back to its base and cuts nothing, so it has no budget and stands "
            f"in no comparison: use billhook restore MODEL --base BASE --recipe {recipe.name}"
        )


def require_path(recipe: Recipe, budget: Budget) -> None:
    """InputError for ``until=cliff`` with a choice that does not go one unit at a time by what it knows of them, or
    with an objective that is not in nats, as the rule of the cliff is."""
    if not budget.until_cliff:
        return
    if not isinstance(recipe.choice, Greedy | OneShot):
        raise InputError(
            f"budget {budget} follows a path of single steps; recipe {recipe.name} ({recipe.choice.word}) has none: "
            f"use a greedy or one-shot recipe, or give an amount"
        )
    if recipe.objective not in (None, "kl", "loss"):
        raise InputError(
            f"budget {budget} is read off the objectives kl and loss, and recipe {recipe.name} goes by "
            f"{recipe.objective}: use another recipe, or give an amount"
        )


def _baseline(word: str, problem: Problem, seed: int) -> Found:
    return search.at_random(problem, seed) if word == "random" else BASELINES[word](problem)


def _objective(recipe: Recipe, kind: Kind | None) -> str:
    if kind is not None:
        return OBJECTIVES[kind]
    return recipe.score.word if recipe.score else "none"
