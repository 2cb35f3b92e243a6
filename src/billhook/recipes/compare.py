"""``billhook compare``: every method on the user's own model and text, side by side."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from billhook.data import Windows
from billhook.data import calibration as windows_of
from billhook.data.calibrate import Domain
from billhook.evaluate import evidence_of_each, remembered
from billhook.evaluate.causal import require_causal
from billhook.evaluate.generations import OPENINGS, prepared, repetition
from billhook.evaluate.probes import answers, paired, posed
from billhook.heal import require_healable
from billhook.measure.sums import Trace
from billhook.models import building, check_out, fingerprint
from billhook.plan.budget import Budget, split_budgets
from billhook.plan.comparison import Comparison, Entry
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.record import ProbeEvidence, TextEvidence
from billhook.plan.target import Target
from billhook.recipes import catalogue
from billhook.recipes.choices import Baseline
from billhook.recipes.costs import costs_of
from billhook.recipes.find import Choice, find, pose_for, require_cut
from billhook.recipes.heal import applied, healing_text, new_weights
from billhook.recipes.measures import watch
from billhook.recipes.opened import Opened, Stopwatch, environment, opened
from billhook.recipes.proof import judged_on
from billhook.recipes.schema import Recipe
from billhook.recipes.settings import (
    CALIBRATION_LENGTH,
    CALIBRATION_TOKENS,
    COMPARED_HEALING_TOKENS,
    COMPARED_LENGTH,
    COMPARED_NEW_TOKENS,
    COMPARED_QUESTIONS,
    COMPARED_TOKENS,
    TRAINING_TOKENS,
)
from billhook.recipes.workplace import claimed, keep
from billhook.report.comparison import write_comparison
from billhook.surgery import apply

Progress = Callable[[str, int, int], None]
Judge = Callable[[Sequence[Any]], list[tuple[TextEvidence, ...]]]
Probe = Callable[[Any], tuple[tuple[ProbeEvidence, ...], tuple[float, float]]]


@dataclass(frozen=True)
class Texts:
    """What is read: by searches, by statistics that one pass gives, by choices that are trained, by healing; and what
    judges. None where no method asks for it."""

    windows: Windows
    survey: Windows | None
    drill: Windows | None
    longer: Windows | None
    judged: tuple[tuple[Domain, Windows], ...]


RANDOM_SEEDS = 3  # one draw says nothing of chance


def compare(
    source: str | os.PathLike[str],
    *,
    budgets: str,
    out: str | os.PathLike[str],
    recipes: Sequence[str | os.PathLike[str]] = (),
    heal: Literal["closed-form", "none"] = "none",
    calibration: str = "builtin",
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    told: Callable[[Entry], None] | None = None,
) -> Comparison:
    """Run ``recipes`` (by default all that come with Billhook, but for those of single weights, those that cut nothing,
    and those of experts where there are none) and the baselines at each budget, judge every result against the dense
    model on the same text, and leave ``comparison.json`` and ``comparison.html`` in ``out``.

    ``budgets`` as in "params=0.9,0.8,0.7": a number without a kind is one more budget of the kind before it. The
    random baseline is drawn several times. By default nothing is healed, so that methods are judged by what they cut;
    those whose act combines blocks do so on the calibration text. With ``heal`` closed-form every result whose act is
    to drop or narrow, baselines included, is judged as cut and again after healing, on the same passes of the dense
    model, and what is said of methods goes by the healed ones. ``told`` hears of each entry when it is done. A recipe
    that cannot meet a budget on this model is an entry that says why.
    Interrupted, the same call goes on after the last finished recipe, and within it after the last finished
    evaluation; recipes with the same objective share their figures.

    Cost: each search, one pass of the dense model and one of each result over the evaluation text, and the probes and
    one batch of short continuations once for the dense model and once for each result. Healing costs each result about
    as much as two passes of the dense model over the healing text, and its regressions: more than most searches, so it
    is asked for.
    """
    check_out(out, overwrite, source)
    asked = split_budgets(budgets)
    chosen = _distinct([*(recipes or _standard()), *BASELINES])
    clock = Stopwatch()
    with clock.step("load"):
        model = opened(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    require_causal(model.model, "compare")
    if not recipes and not any("expert" in sublayer.inner for _, sublayer in model.anatomy.outline.sublayers()):
        chosen = [recipe for recipe in chosen if recipe.unit != "expert"]  # it has none, which need not be said
    if heal != "none":
        require_healable(model.anatomy)
        if len(model.anatomy.stacks) > 1:  # some method may cut in several, and healing takes one at a time
            names = " and ".join(stack.name for stack in model.anatomy.stacks)
            raise InputError(f"a comparison heals models of one stack; this one has {names}: use --heal none")
    asked_of = posed(model.model, model.tokenizer, COMPARED_QUESTIONS)
    for opening in OPENINGS:
        prepared(model.model, model.tokenizer, opening, COMPARED_NEW_TOKENS)
    with claimed(out) as place:
        with clock.step("measure"):
            windows = windows_of(
                calibration,
                model.tokenizer,
                tokens=CALIBRATION_TOKENS,
                length=model.length(CALIBRATION_LENGTH),
                seed=seed,
                model=model.model,
                progress=progress,
            )
            survey = longer = None
            if any(recipe.surveys for recipe in chosen):
                survey = healing_text(model, calibration, seed, progress)
            if heal != "none":
                longer = healing_text(model, calibration, seed, progress, tokens=COMPARED_HEALING_TOKENS)
            drill: Windows | None = None
            if any(recipe.trains for recipe in chosen):
                from billhook.recipes import training  # with peft and accelerate: seconds

                drill = training.training_text(model, calibration, TRAINING_TOKENS, seed, place, progress)
            judged = judged_on(
                model,
                calibration,
                [windows, *(text for text in (survey, longer, drill) if text is not None)],
                seed,
                progress,
                tokens=COMPARED_TOKENS,
                length=COMPARED_LENGTH,
            )
            texts = Texts(windows, survey, drill, longer, tuple(judged))
            seen = watch(model, windows, progress)
            known = remembered(model.model, judged)
        with clock.step("probes"):
            of_dense = answers(model.model, asked_of, progress)
            before = repetition(model.model, model.tokenizer, max_new_tokens=COMPARED_NEW_TOKENS)

        def judge(compressed: Sequence[Any]) -> list[tuple[TextEvidence, ...]]:
            return evidence_of_each(model.model, compressed, judged, of_dense=known, progress=progress)

        def probe(compressed: Any) -> tuple[tuple[ProbeEvidence, ...], tuple[float, float]]:
            after = repetition(compressed, model.tokenizer, max_new_tokens=COMPARED_NEW_TOKENS)
            return paired(of_dense, answers(compressed, asked_of, progress)), (before, after)

        draws = [(r, seed + n) for r in chosen for n in range(RANDOM_SEEDS if r.choice.word == "random" else 1)]
        entries: list[Entry] = []
        for number, (recipe, drawn) in enumerate(draws):
            if progress is not None:
                progress("recipes", number, len(draws))
            kept = place / f"{_key(recipe, asked, drawn, model, texts)}.json"
            if kept.exists():
                new = [Entry.model_validate(row) for row in json.loads(kept.read_text(encoding="utf-8"))]
            else:
                with clock.step("recipes"):
                    new = _judged(recipe, asked, drawn, model, texts, seen, judge, probe, place, progress)
                keep(kept, new)
            for entry in new:
                if told is not None:
                    told(entry)
            entries += new
        if progress is not None:
            progress("recipes", len(draws), len(draws))
        result = Comparison(
            model=os.fspath(source),
            outline=model.anatomy.outline,
            calibration=calibration,
            tokens=windows.ids.numel(),
            surveyed=survey.tokens if survey is not None else 0,
            budgets=tuple(asked),
            entries=tuple(entries),
            titles={recipe.name: recipe.title for recipe in chosen},
            recipes=tuple(os.fspath(given) for given in recipes),
            dtype=dtype or "",
            heal=heal,
            environment=environment(model),
            seconds=clock.seconds,
        )
        with building(out, overwrite) as folder:
            write_comparison(result, Path(folder))
        shutil.rmtree(place, ignore_errors=True)
    return result


def _distinct(sources: Sequence[str | os.PathLike[str]]) -> list[Recipe]:
    """The recipes, each once. InputError for two of one name, which no table could tell apart."""
    found: dict[str, Recipe] = {}
    for source in sources:
        recipe = catalogue.load(source)
        require_cut(recipe)
        if found.setdefault(recipe.name, recipe) != recipe:
            raise InputError(
                f"two different recipes are called {recipe.name}, and every comparison has the baselines "
                f"{', '.join(BASELINES)}: give yours another name"
            )
    return list(found.values())


def _standard() -> list[str]:
    """All but those of single weights (zeros save parameters alone, so beside cuts that save file and time they would
    win for nothing) and those that cut nothing."""
    return [recipe.name for recipe in catalogue.recipes() if recipe.unit != "weight" and not recipe.returns]


#: Stand in every comparison.
BASELINES = ("random", "evenly-spaced", "first", "last")


def _judged(
    recipe: Recipe,
    budgets: Sequence[str],
    seed: int,
    model: Opened,
    texts: Texts,
    seen: Trace,
    judge: Judge,
    probe: Probe,
    place: Path,
    progress: Progress | None,
) -> list[Entry]:
    """The entries of one recipe, one a budget."""
    target = recipe.aim
    entries: list[Entry] = []
    choices: list[Choice | None] = []
    for budget in budgets:
        entry, choice = _searched(recipe, budget, seed, target, model, texts, seen, place, progress)
        entries.append(entry)
        choices.append(choice)
    cut: list[Any] = []
    again: list[Any] = []
    for number, (entry, choice) in enumerate(zip(entries, choices, strict=True)):
        if choice is None:
            continue
        try:
            acted = _acted(recipe, model, choice, target, texts.windows, progress)
            heals = (
                texts.longer is not None
                and recipe.act == "drop"
                and recipe.unit != "weight"
                and not (recipe.trains or recipe.learns_ranks)
            )
            healed = [_healed(model, choice.plan(target), texts.longer, progress)] if heals and texts.longer else []
        except InputError as error:  # one method that cannot be carried out does not end the comparison
            entries[number] = entry.model_copy(update={"refused": str(error)})
            continue
        cut.append(acted)
        again.extend(healed)
    met = [entry for entry in entries if not entry.refused]
    found = judge([*cut, *again]) if met else []
    proofs = zip_longest(found[: len(met)], found[len(met) :], again or cut, fillvalue=())
    proven = ((one, other, *probe(best)) for one, other, best in proofs)
    names = ("evidence", "healed", "probes", "repeated")
    return [
        entry if entry.refused else entry.model_copy(update=dict(zip(names, next(proven), strict=True)))
        for entry in entries
    ]


def _acted(
    recipe: Recipe, model: Opened, choice: Choice, target: Target, windows: Windows, progress: Progress | None
) -> Any:
    """The cut model; with the new weights that came with the choice, or that an act which combines blocks makes of the
    calibration text."""
    plan = choice.plan(target)
    if choice.healing is not None:
        return applied(model, plan, choice.healing)
    if recipe.act in ("drop", "share"):
        return apply(model.model, model.anatomy, plan)
    return applied(model, plan, new_weights(model, plan, recipe.act, windows, progress))


def _healed(model: Opened, plan: Plan, text: Windows, progress: Progress | None) -> Any:
    return applied(model, plan, new_weights(model, plan, "closed-form", text, progress))


def _searched(
    recipe: Recipe,
    budget: str,
    seed: int,
    target: Target,
    model: Opened,
    texts: Texts,
    seen: Trace,
    place: Path,
    progress: Progress | None,
) -> tuple[Entry, Choice | None]:
    """What is known before anything is carried out; no choice where it was refused."""
    entry = Entry(
        recipe=recipe.name, seed=seed, baseline=isinstance(recipe.choice, Baseline), asked=budget, target=target
    )
    clock = Stopwatch()
    try:
        with clock.step("search"):
            problem = pose_for(recipe, model.anatomy.outline, Budget.parse(budget), target)
            if recipe.act not in ("drop", "share"):
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
            )
    except InputError as error:
        return entry.model_copy(update={"refused": str(error)}), None
    plan = choice.plan(target)
    costs = costs_of(plan, model.anatomy.outline)
    known = entry.model_copy(
        update={
            "drops": tuple(str(unit) for unit in sorted(choice.found.drops)),
            "keeps": choice.keeps,
            "sparsities": choice.sparsities,
            "factors": plan.factors,
            "channels": plan.channels,
            "schedule": choice.schedule,
            "realised": {kind: cost.compressed / cost.dense for kind, cost in costs.items() if cost.dense},
            "work": choice.found.work,
            "evaluations": choice.found.evaluations,
            "seconds": clock.seconds["search"],
        }
    )
    return known, choice


def _key(
    recipe: Recipe,
    budgets: Sequence[str],
    seed: int,
    model: Opened,
    texts: Texts,
) -> str:
    """Names everything that the entries of a recipe depend on."""
    parts: dict[str, object] = {
        "recipe": recipe.model_dump(mode="json"),
        "budgets": budgets,
        "seed": seed,
        "model": fingerprint(model.model),
        "environment": environment(model),
        "calibration": texts.windows.fingerprint,
        "surveyed": texts.survey.fingerprint if texts.survey is not None and recipe.surveys else "",
        "trained on": texts.drill.fingerprint if texts.drill is not None and recipe.trains else "",
        "texts": [text.fingerprint for _, text in texts.judged],
        "questions": COMPARED_QUESTIONS,
        "openings": [COMPARED_NEW_TOKENS, *OPENINGS],
        "healed on": texts.longer.fingerprint if texts.longer is not None else "",
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
