"""``billhook compress``: the whole walk, from a model to a smaller one with its proof."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from billhook.data import Windows
from billhook.evaluate import PROMPTS, prepared
from billhook.evaluate.causal import require_causal
from billhook.evaluate.probes import posed
from billhook.export.huggingface import save
from billhook.heal import UNTOUCHED
from billhook.heal.refit.eora import size_of
from billhook.measure.cost import CostModel
from billhook.models import building, check_out, fingerprint, stored_as
from billhook.plan import processes
from billhook.plan.budget import Budget, Limit
from billhook.plan.check import check_target
from billhook.plan.errors import InputError
from billhook.plan.heals import TRAINED, Heal
from billhook.plan.outline import Outline
from billhook.plan.plan import Plan, Provenance
from billhook.plan.record import HealStep, Run
from billhook.recipes.choices import LearnedMasks
from billhook.recipes.evaluate import calibrated_with
from billhook.recipes.fast_enough import decode_time, fast_enough
from billhook.recipes.find import Choice, Task, find, pose_for, require_path
from billhook.recipes.heal import applied, cost_fields, new_weights, record_of, require_sharable
from billhook.recipes.measures import measures, watch
from billhook.recipes.once import Once
from billhook.recipes.opened import Opened, Stopwatch, environment, opened, versions
from billhook.recipes.proof import judged_on, proven, write_down
from billhook.recipes.schema import Recipe
from billhook.recipes.selection import Asked, asked, require_one_text
from billhook.recipes.settings import TRAINING_TOKENS
from billhook.recipes.settled import posed_first, require_fitting, settled, way_of
from billhook.recipes.texts import Texts, calibration_text, healing_text
from billhook.recipes.together import of_the_first, shared
from billhook.surgery import apply

if TYPE_CHECKING:
    from billhook.heal.selecting.select import Selection

Progress = Callable[[str, int, int], None]


def compress(
    source: str | os.PathLike[str],
    *,
    budget: str,
    out: str | os.PathLike[str],
    recipe: str | os.PathLike[str] | None = None,
    heal: Heal | None = None,
    select: str = "none",
    target: str | None = None,
    calibration: str = "builtin",
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    max_new_tokens: int = 40,
    prior: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Run:
    """Cut a model down to a budget (see ``Budget``) and leave checkpoint, record, card and report in ``out``.

    The budget ``latency`` is measured: decoding at batch 1, the cut model against the dense one, for cuts to one share
    of the block parameters after the other (see ``fast_enough``). Each costs some seconds and a search,
    of which what one pass gives is taken and charged once.

    Without a ``target`` the result may be whatever the recipe's units make of it: an ordinary checkpoint for whole
    blocks and equally many experts (``uniform``), one with remote code for sublayers (``remote``). Without a ``recipe``
    the first of the default ones for the target (``catalogue``) is taken that can meet the budget on this model;
    ``heal`` is what the recipe says unless told, and an act that combines blocks or experts stands in its place.
    ``select``: which text a healing by training reads (see ``heal``). ``prior``: an earlier result, with whose masks a
    recipe that learns masks begins.
    Everything that can be refused is refused before the search; an interrupted search goes on from its last finished
    evaluation when the same call is made again (its ledger lies beside ``out`` until then). Two runs cannot work on one
    ``out`` at once. Under ``accelerate launch`` the first process searches, all share the refit in closed form and the
    training, and the first one alone proves and writes the result; what the others return is without proof.
    """
    check_out(out, overwrite, source)
    asked_for = Budget.parse(budget)
    limits = asked_for if asked_for.latency is None else _params(asked_for.latency)
    candidates, aim = settled(recipe, target, limits)
    for candidate in candidates:
        require_path(candidate, limits)
    if asked_for.latency is not None and candidates[0].unit in ("weight", "expert"):
        raise InputError(
            f"budget {asked_for}: a token takes as long without the {candidates[0].unit}s that recipe "
            f"{candidates[0].name} takes away"
        )
    way = way_of(candidates[0], heal)  # the default recipes are at one in this
    wanted = asked(select, way)
    require_one_text(wanted, calibration)
    device = processes.local(device)
    require_sharable(way)
    begins = None if prior is None else Plan.read(prior)
    if begins is not None and not isinstance(candidates[0].choice, LearnedMasks):
        raise InputError(f"--prior is what learned masks begin with, and recipe {candidates[0].name} learns none")
    clock = Stopwatch()
    with clock.step("load"):
        model = opened(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    outline = model.anatomy.outline
    check_target(aim, outline)
    require_causal(model.model, "compress")
    if way == "eora":
        limits = _less(limits, size_of(model.model, model.anatomy, "decoder"), outline)
    chosen, problem = posed_first(candidates, outline, limits, aim)
    require_fitting(chosen, way, aim, limits, begins, model)
    tokenizer = model.tokenizer
    for prompt in PROMPTS:
        prepared(model.model, tokenizer, prompt, max_new_tokens)
    posed(model.model, tokenizer)

    with shared(out, device) as (place, first):
        with clock.step("measure"):
            texts, lessons = _read(chosen, way, wanted, model, calibration, seed, prior, place, progress)
            seen = watch(model, texts.windows, progress)

        once = Once()

        def search(task: Task) -> Choice:
            return find(
                chosen,
                model,
                task,
                texts.windows,
                seen,
                seed=seed,
                place=place,
                progress=progress,
                survey=texts.survey,
                lessons=texts.drill,
                prior=begins,
                once=once,
            )

        def searched() -> tuple[Choice, dict[str, float]]:
            if asked_for.latency is None:
                return search(problem), {}
            looks: list[Choice] = []

            def cut_to(share: float) -> Choice:
                looks.append(search(pose_for(chosen, outline, _params(share), aim)))
                return looks[-1]

            def time_of(look: Choice) -> float:
                return decode_time(model.model, apply(model.model, model.anatomy, look.plan(aim)))

            choice, time = fast_enough(asked_for.latency, cut_to, time_of, progress)
            work = sum(look.record.work for look in looks)
            return replace(choice, record=choice.record.model_copy(update={"work": work})), {"latency": time}

        with clock.step("search"):
            choice, measured = of_the_first(searched)

        plan = choice.plan(aim).model_copy(
            update={
                "budget": str(asked_for),
                "provenance": Provenance(
                    model=fingerprint(model.model),
                    calibration=texts.windows.fingerprint,
                    recipe=chosen.name,
                    seed=seed,
                    versions=versions(),
                ),
            }
        )
        cut = compressed = apply(model.model, model.anatomy, plan)
        healing = begun = None
        found, steps = choice.healing or UNTOUCHED, []
        if choice.healing is not None:
            steps.append(HealStep(method=chosen.makes, text=calibration, seed=seed))
        words = "" if wanted is None else select
        step = HealStep(method=way, text=calibration, seed=seed, select=words, counted=way == "eora")
        if texts.longer is not None and (choice.healing is None or chosen.unit == "weight"):
            with clock.step("heal"):
                if lessons is None:
                    found = new_weights(model, plan, way, texts.longer, progress, found)
                    steps.append(step)
                else:
                    from billhook.recipes import training  # with peft and accelerate: seconds

                    known = record_of(found, *steps) if plan.sparsities else texts.longer  # zeros are not refitted
                    done = training.taught(model, plan, step, found, known, lessons, TRAINING_TOKENS, place, progress)
                    compressed, begun, healing = done.compressed, done.begun, done.record
        if steps and healing is None:
            compressed, healing = applied(model, plan, found), record_of(found, *steps)
        costs = cost_fields(plan, outline, found)
        run = Run(
            model=os.fspath(source),
            outline=outline,
            plan=plan,
            asked=str(asked_for),
            realised=costs["realised"] | measured,
            costs=costs["costs"],
            search=choice.record.model_copy(
                update={
                    "prior": "" if prior is None else os.fspath(prior),
                    "surveyed": texts.survey.tokens if texts.survey is not None else 0,
                }
            ),
            measures=measures(model, calibration, texts.windows, seen, choice.importance),
            healing=healing,
            environment=environment(model),
        )
        if not first:
            return run
        run = proven(run, model, cut, compressed, plan, texts.judged, max_new_tokens, clock, progress, begun)
        run = run.model_copy(update={"seconds": clock.seconds})
        with building(out, overwrite) as folder, stored_as(compressed, model.stored):
            save(compressed, model.anatomy, plan, Path(folder), tokenizer, model.loaded.folder)
            write_down(run, Path(folder))
        shutil.rmtree(place, ignore_errors=True)
    return run


def _params(share: float) -> Budget:
    return Budget.parse(f"params={share:.4f}")


def _read(
    recipe: Recipe,
    way: str,
    wanted: Asked | None,
    model: Opened,
    calibration: str,
    seed: int,
    prior: str | os.PathLike[str] | None,
    place: Path,
    progress: Progress | None,
) -> tuple[Texts, Windows | Selection | None]:
    """All that is read, and what a healing by training learns from."""
    windows = calibration_text(model, calibration, seed, progress)
    long = healing_text(model, calibration, seed, progress) if way != "none" or recipe.surveys else None
    drill: Windows | None = None
    lessons: Windows | Selection | None = None
    if way in TRAINED or recipe.trains:
        from billhook.recipes import training  # with peft and accelerate: seconds
    if recipe.trains:
        drill = training.training_text(model, calibration, TRAINING_TOKENS, seed, place, progress)
    if way in TRAINED:
        if wanted is None:
            lessons = training.training_text(model, calibration, TRAINING_TOKENS, seed, place, progress)
        else:
            lessons = training.selection(model, calibration, wanted, TRAINING_TOKENS, seed, place, progress)
    read = [windows, long, drill, lessons if lessons is None or isinstance(lessons, Windows) else lessons.windows]
    before = () if prior is None else calibrated_with(prior)
    judged = judged_on(
        model, calibration, [text for text in read if text is not None], seed, progress, read_before=before
    )
    survey, longer = long if recipe.surveys else None, long if way != "none" else None
    return Texts(windows, survey, drill, longer, tuple(judged)), lessons


def _less(budget: Budget, parameters: int, outline: Outline) -> Budget:
    """What a budget of parameters leaves for the masks beside paths with so many."""
    if budget.until_cliff or {limit.kind for limit in budget.limits} != {"params"}:
        return budget  # refused where the masks are posed
    ceiling = budget.ceilings(CostModel(outline).dense)["params"]
    if ceiling <= parameters:
        raise InputError(
            f"budget {budget} cannot be met: the paths of --heal eora alone have {parameters:,} parameters"
        )
    return Budget((Limit("params", ceiling - parameters, relative=False, text=str(budget)),))
