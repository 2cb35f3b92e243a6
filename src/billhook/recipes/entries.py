"""The entries of one method in a comparison: searched at each budget, carried out, and judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from billhook.data import Windows
from billhook.evaluate import Remembered, evidence_of_each
from billhook.evaluate.generations import repetition
from billhook.evaluate.probes import Answers, Probes, answers, paired
from billhook.heal import require_healable
from billhook.measure.sums import Trace
from billhook.plan.budget import Budget
from billhook.plan.comparison import Entry
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.recipes.choices import Baseline
from billhook.recipes.costs import costs_of, of_dense
from billhook.recipes.find import Choice, find, pose_for
from billhook.recipes.heal import applied, new_weights
from billhook.recipes.once import Once
from billhook.recipes.opened import Opened, Stopwatch
from billhook.recipes.schema import Recipe
from billhook.recipes.settings import COMPARED_NEW_TOKENS
from billhook.recipes.texts import Texts
from billhook.surgery import apply

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Reference:
    """What the dense model makes of all that judges a result: of the text, of the questions ``asked``, and how much it
    repeats itself. Found once, for every result."""

    asked: Probes
    of_text: Remembered
    answers: Answers
    repeated: float


def entries_of(
    recipe: Recipe,
    budgets: Sequence[str],
    seed: int,
    model: Opened,
    texts: Texts,
    seen: Trace,
    dense: Reference,
    place: Path,
    progress: Progress | None,
    before: Sequence[Entry] = (),
) -> list[Entry]:
    """The entries of one recipe, one a budget; where it cannot be carried out or the result not judged, one that says
    why.

    Healed on ``texts.longer`` and judged once more, where there is such text and healing fits the method. Where the
    recipe only cuts, and one of ``before`` (entries of others that do) cut the same, it is judged as that one was."""
    longer = texts.longer if recipe.only_cuts else None
    entries: list[Entry] = []
    once = Once(each=True)  # each entry says what its search alone would have cost
    for budget in budgets:
        entry, choice = _searched(recipe, budget, seed, model, texts, seen, once, place, progress)
        same = _same_cut(entry, before) if recipe.only_cuts else None
        if choice is not None and same is not None:
            entry = entry.model_copy(update={field: getattr(same, field) for field in _OF_THE_RESULT})
        elif choice is not None:
            try:
                results = [_acted(recipe, model, choice, texts.survey or texts.windows, progress)]
                if longer is not None:
                    results.append(_healed(model, choice.plan(recipe.aim), longer, progress))
                entry = entry.model_copy(update=_proof(model, results, texts, dense, progress))
            except InputError as error:  # one result that cannot be made or judged does not end the comparison
                entry = entry.model_copy(update={"refused": str(error)})
        entries.append(entry)
    return entries


#: What an entry says of its result, and not of how it was found.
_OF_THE_RESULT = ("evidence", "healed", "probes", "repeated")


def _same_cut(entry: Entry, before: Sequence[Entry]) -> Entry | None:
    """The first judged entry that leaves the same of the same weights. None for linears taken apart: with equal ranks
    they are not equal parts."""

    def cut(one: Entry) -> object:
        return one.drops, one.keeps, one.factors, one.channels, one.schedule, one.target

    return next((one for one in before if one.evidence and not one.factors and cut(one) == cut(entry)), None)


def _searched(
    recipe: Recipe,
    budget: str,
    seed: int,
    model: Opened,
    texts: Texts,
    seen: Trace,
    once: Once,
    place: Path,
    progress: Progress | None,
) -> tuple[Entry, Choice | None]:
    """What is known before anything is carried out; no choice where it was refused."""
    entry = Entry(
        recipe=recipe.name, seed=seed, baseline=isinstance(recipe.choice, Baseline), asked=budget, target=recipe.aim
    )
    clock = Stopwatch()
    try:
        with clock.step("search"):
            problem = pose_for(recipe, model.anatomy.outline, Budget.parse(budget), recipe.aim)
            if recipe.combines:
                require_healable(model.anatomy)
            choice = find(
                recipe,
                model,
                problem,
                texts.windows,
                seen,
                seed=seed,
                place=place,
                progress=progress,
                survey=texts.survey,
                lessons=texts.drill,
                once=once,
            )
    except InputError as error:
        return entry.model_copy(update={"refused": str(error)}), None
    plan = choice.plan(recipe.aim)
    costs = costs_of(plan, model.anatomy.outline)
    known = entry.model_copy(
        update={
            "drops": tuple(str(unit) for unit in sorted(choice.found.drops)),
            "keeps": choice.keeps,
            "sparsities": choice.sparsities,
            "factors": plan.factors,
            "channels": plan.channels,
            "schedule": choice.schedule,
            "realised": of_dense(costs),
            "work": choice.found.work,
            "evaluations": choice.found.evaluations,
            "seconds": clock.seconds["search"],
        }
    )
    return known, choice


def _acted(recipe: Recipe, model: Opened, choice: Choice, windows: Windows, progress: Progress | None) -> Any:
    """The cut model; with the new weights that came with the choice, or that an act which combines blocks makes of
    ``windows``."""
    plan = choice.plan(recipe.aim)
    if choice.healing is not None:
        return applied(model, plan, choice.healing)
    if recipe.combines:
        return applied(model, plan, new_weights(model, plan, recipe.act, windows, progress))
    return apply(model.model, model.anatomy, plan)


def _healed(model: Opened, plan: Plan, longer: Windows, progress: Progress | None) -> Any:
    try:
        return applied(model, plan, new_weights(model, plan, "closed-form", longer, progress))
    except InputError as error:
        raise InputError(f"healing failed: {error}") from error


def _proof(
    model: Opened, results: Sequence[Any], texts: Texts, dense: Reference, progress: Progress | None
) -> dict[str, object]:
    """What text, probes and continuations say beside the dense model: text of the cut model and of the healed one where
    there is one, the others of the last of them."""
    best = results[-1]
    evidence, *healed = evidence_of_each(model.model, results, texts.judged, of_dense=dense.of_text, progress=progress)
    return {
        "evidence": evidence,
        "healed": healed[0] if healed else (),
        "probes": paired(dense.answers, answers(best, dense.asked, progress)),
        "repeated": (dense.repeated, repetition(best, model.tokenizer, max_new_tokens=COMPARED_NEW_TOKENS)),
    }
