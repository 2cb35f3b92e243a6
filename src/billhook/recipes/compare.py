"""``billhook compare``: every method on the user's own model and text, side by side."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from billhook.evaluate import remembered
from billhook.evaluate.causal import require_causal
from billhook.evaluate.generations import OPENINGS, prepared, repetition
from billhook.evaluate.probes import answers, posed
from billhook.heal import require_healable
from billhook.models import building, check_out, fingerprint
from billhook.plan.budget import split_budgets
from billhook.plan.comparison import Comparison, Entry
from billhook.plan.errors import InputError
from billhook.recipes import catalogue
from billhook.recipes.entries import Reference, entries_of
from billhook.recipes.find import require_cut
from billhook.recipes.measures import watch
from billhook.recipes.opened import Opened, Stopwatch, environment, opened
from billhook.recipes.proof import judged_on
from billhook.recipes.schema import Recipe
from billhook.recipes.settings import (
    COMPARED_HEALING_TOKENS,
    COMPARED_LENGTH,
    COMPARED_NEW_TOKENS,
    COMPARED_QUESTIONS,
    COMPARED_TOKENS,
    TRAINING_TOKENS,
)
from billhook.recipes.texts import Texts, calibration_text, healing_text
from billhook.recipes.workplace import claimed, keep
from billhook.report.comparison import write_comparison

Progress = Callable[[str, int, int], None]
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
    those whose act makes new weights do so on as much text as ``compress`` gives them. With ``heal`` closed-form every
    result whose act is to drop or narrow, baselines included, is judged as cut and again after healing, on the same
    passes of the dense model, and what is said of methods goes by the healed ones. ``told`` hears of each entry when it
    is done. A recipe that cannot meet a budget on this model, or whose result cannot be healed or judged, is an entry
    that says why.
    Interrupted, the same call goes on after the last finished recipe, and within it after the last finished
    evaluation; recipes with the same objective share their figures, and those that cut the same are judged once.

    Cost: each search (what does not depend on the budget once for all budgets, though each entry is charged for it),
    one pass of the dense model and one of each result over the evaluation text, and the probes and one batch of short
    continuations once for the dense model and once for each result that differs. Healing costs each result about as
    much as two passes of the dense model over the healing text, and its regressions: more than most searches, so it is
    asked for.
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
            texts = _texts(chosen, heal, model, calibration, seed, place, progress)
            seen = watch(model, texts.windows, progress)
            known = remembered(model.model, texts.judged)
        with clock.step("probes"):
            right = answers(model.model, asked_of, progress)
            repeated = repetition(model.model, model.tokenizer, max_new_tokens=COMPARED_NEW_TOKENS)
            dense = Reference(asked_of, known, right, repeated)

        draws = [(r, seed + n) for r in chosen for n in range(RANDOM_SEEDS if r.choice.word == "random" else 1)]
        entries: list[Entry] = []
        cuts: list[Entry] = []  # of those that only cut: what they leave is judged once
        for number, (recipe, drawn) in enumerate(draws):
            if progress is not None:
                progress("recipes", number, len(draws))
            kept = place / f"{_key(recipe, asked, drawn, model, texts)}.json"
            if kept.exists():
                new = [Entry.model_validate(row) for row in json.loads(kept.read_text(encoding="utf-8"))]
            else:
                with clock.step("recipes"):
                    new = entries_of(recipe, asked, drawn, model, texts, seen, dense, place, progress, cuts)
                keep(kept, new)
            for entry in new:
                if told is not None:
                    told(entry)
            entries += new
            cuts += new if recipe.only_cuts else []
        if progress is not None:
            progress("recipes", len(draws), len(draws))
        result = Comparison(
            model=os.fspath(source),
            outline=model.anatomy.outline,
            calibration=calibration,
            tokens=texts.windows.ids.numel(),
            surveyed=texts.survey.tokens if texts.survey is not None else 0,
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


def _texts(
    recipes: Sequence[Recipe],
    heal: str,
    model: Opened,
    calibration: str,
    seed: int,
    place: Path,
    progress: Progress | None,
) -> Texts:
    """All that the methods read, and what judges them, which none of them has read."""
    windows = calibration_text(model, calibration, seed, progress)
    survey = drill = longer = None
    if any(recipe.surveys or recipe.combines for recipe in recipes):
        survey = healing_text(model, calibration, seed, progress)
    if heal != "none":
        longer = healing_text(model, calibration, seed, progress, tokens=COMPARED_HEALING_TOKENS)
    if any(recipe.trains for recipe in recipes):
        from billhook.recipes import training  # with peft and accelerate: seconds

        drill = training.training_text(model, calibration, TRAINING_TOKENS, seed, place, progress)
    read = [windows, *(text for text in (survey, longer, drill) if text is not None)]
    judged = judged_on(model, calibration, read, seed, progress, tokens=COMPARED_TOKENS, length=COMPARED_LENGTH)
    return Texts(windows, survey, drill, longer, tuple(judged))


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
        "surveyed": texts.survey.fingerprint if texts.survey and (recipe.surveys or recipe.combines) else "",
        "trained on": texts.drill.fingerprint if texts.drill is not None and recipe.trains else "",
        "texts": [text.fingerprint for _, text in texts.judged],
        "questions": COMPARED_QUESTIONS,
        "openings": [COMPARED_NEW_TOKENS, *OPENINGS],
        "healed on": texts.longer.fingerprint if texts.longer is not None else "",
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
