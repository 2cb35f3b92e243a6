"""``billhook compress``: the whole walk, from a model to a smaller one with its proof."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from billhook.data import Windows
from billhook.data import calibration as windows_of
from billhook.evaluate import PROMPTS, prepared
from billhook.evaluate.causal import require_causal
from billhook.evaluate.probes import posed
from billhook.export.huggingface import save
from billhook.heal import UNTOUCHED, require_healable
from billhook.heal.eora import size_of
from billhook.heal.gains import require_gains
from billhook.heal.mask_tuning import NOTHING
from billhook.measure.cost import CostModel
from billhook.models import building, check_out, fingerprint, stored_as
from billhook.plan import processes
from billhook.plan.budget import Budget, Limit
from billhook.plan.check import check_target
from billhook.plan.errors import InputError
from billhook.plan.outline import Outline
from billhook.plan.plan import Plan, Provenance
from billhook.plan.record import HealStep, Run
from billhook.plan.target import Target
from billhook.recipes import catalogue
from billhook.recipes.choices import BiMask, GroupSparse, LearnedMasks
from billhook.recipes.evaluate import calibrated_with
from billhook.recipes.fast_enough import decode_time, fast_enough
from billhook.recipes.find import Choice, Task, find, pose_for, require_cut, require_path
from billhook.recipes.flattening import require_flattening
from billhook.recipes.heal import applied, cost_fields, healing_text, new_weights, record_of, require_sharable
from billhook.recipes.learned_weights import require_prior
from billhook.recipes.measures import measures, watch
from billhook.recipes.opened import Stopwatch, environment, opened, versions
from billhook.recipes.proof import judged_on, proven, write_down
from billhook.recipes.schema import TRAINED, Heal, Recipe
from billhook.recipes.selection import asked
from billhook.recipes.settings import CALIBRATION_LENGTH, CALIBRATION_TOKENS, TRAINING_TOKENS
from billhook.recipes.sharing import require_sharing
from billhook.recipes.together import of_the_first, shared
from billhook.recipes.weights import require_weights
from billhook.surgery import apply

if TYPE_CHECKING:
    from billhook.heal.select import Selection

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
    of the block parameters after the other (see ``fast_enough``). Each costs a search and some seconds.

    Without a ``target`` the result may be whatever the recipe's units make of it: an ordinary checkpoint for whole
    blocks and equally many experts (``uniform``), one with remote code for sublayers (``remote``). Without a ``recipe``
    the first of the default ones for the target (``catalogue``) is taken that can meet the budget on this model;
    ``heal`` is what the recipe says unless told, and an act that combines blocks or experts stands in its place.
    ``select``: which text a healing by training reads (see ``heal``). ``prior``: an earlier result, with whose masks a
    recipe that learns masks begins.
    Everything that can be refused is refused before the search; an interrupted search goes on from its last finished
    evaluation when the same call is made again (its ledger lies beside ``out`` until then). Two runs cannot work on one
    ``out`` at once. Under ``accelerate launch`` the first process searches, all share the training, and the first one
    alone proves and writes the result; what the others return is without proof.
    """
    check_out(out, overwrite, source)
    asked_for = Budget.parse(budget)
    limits = asked_for if asked_for.latency is None else _params(asked_for.latency)
    candidates, aim = _settled(recipe, target, limits)
    for candidate in candidates:
        require_path(candidate, limits)
    if asked_for.latency is not None and candidates[0].unit in ("weight", "expert"):
        raise InputError(
            f"budget {asked_for}: a token takes as long without the {candidates[0].unit}s that recipe "
            f"{candidates[0].name} takes away"
        )
    way = _way(candidates[0], heal)  # the default recipes are at one in this
    wanted = asked(select, way)
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
    chosen, problem = _posed(candidates, outline, limits, aim)
    if way != "none":
        require_healable(model.anatomy)
    if way == "gains":
        require_gains(model.anatomy)
    require_sharing(chosen, model, limits)
    require_flattening(chosen, model)
    require_weights(chosen, model)
    if begins is not None:
        require_prior(begins, model)
    if way in ("bias", "data-free", "scales") and not chosen.wide:
        raise InputError(f"--heal {way} makes up for units inside sublayers, and recipe {chosen.name} takes none away")
    if way == "bias" and aim in (Target.UNIFORM, Target.DECI):
        raise InputError(f"--heal bias gives linears a bias of their own, which target {aim} cannot carry")
    if chosen.unit == "channel" and way not in ("none", "closed-form"):
        raise InputError(f"recipe {chosen.name} cuts hidden channels, which --heal {way} knows nothing of")
    if chosen.unit == "linear" and way in TRAINED:
        raise InputError(
            f"recipe {chosen.name} leaves linears in two parts, which --heal {way} cannot train; take closed-form"
        )
    tokenizer = model.tokenizer
    for prompt in PROMPTS:
        prepared(model.model, tokenizer, prompt, max_new_tokens)
    posed(model.model, tokenizer)

    with shared(out, device) as (place, first):
        with clock.step("measure"):
            windows = of_the_first(
                lambda: windows_of(
                    calibration,
                    tokenizer,
                    tokens=CALIBRATION_TOKENS,
                    length=model.length(CALIBRATION_LENGTH),
                    seed=seed,
                    model=model.model,
                    progress=progress,
                )
            )
            surveyed = healing_text(model, calibration, seed, progress) if way != "none" or chosen.surveys else None
            longer = surveyed if way != "none" else None
            lessons: Windows | Selection | None = None
            drill: Windows | None = None
            if way in TRAINED or chosen.trains:
                from billhook.recipes import training  # with peft and accelerate: seconds
            if chosen.trains:
                drill = training.training_text(model, calibration, TRAINING_TOKENS, seed, place, progress)
            if way in TRAINED:
                if wanted is None:
                    lessons = training.training_text(model, calibration, TRAINING_TOKENS, seed, place, progress)
                else:
                    lessons = training.selection(model, calibration, wanted, TRAINING_TOKENS, seed, place, progress)
            read = [
                windows,
                surveyed,
                drill,
                lessons if lessons is None or isinstance(lessons, Windows) else lessons.windows,
            ]
            before = () if prior is None else calibrated_with(prior)
            texts = judged_on(
                model, calibration, [text for text in read if text is not None], seed, progress, read_before=before
            )
            seen = watch(model, windows, progress)

        def search(problem: Task = problem) -> Choice:
            return find(
                chosen,
                model,
                problem,
                windows,
                seen,
                seed=seed,
                place=place,
                progress=progress,
                survey=surveyed,
                lessons=drill,
                prior=begins,
            )

        def searched() -> tuple[Choice, dict[str, float]]:
            if asked_for.latency is None:
                return search(), {}
            looks: list[Choice] = []

            def cut_to(share: float) -> Choice:
                looks.append(search(pose_for(chosen, outline, _params(share), aim)))
                return looks[-1]

            choice, time = fast_enough(
                asked_for.latency,
                cut_to,
                lambda cut: decode_time(model.model, apply(model.model, model.anatomy, cut.plan(aim))),
                progress,
            )
            work = sum(look.record.work for look in looks)
            return replace(choice, record=choice.record.model_copy(update={"work": work})), {"latency": time}

        with clock.step("search"):
            choice, measured = of_the_first(searched)

        plan = choice.plan(aim).model_copy(
            update={
                "budget": str(asked_for),
                "provenance": Provenance(
                    model=fingerprint(model.model),
                    calibration=windows.fingerprint,
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
        if longer is not None and (choice.healing is None or way == "eora"):
            with clock.step("heal"):
                if lessons is None:
                    found = new_weights(model, plan, way, longer, progress, found)
                    steps.append(step)
                else:
                    done = training.taught(
                        model, plan, step, UNTOUCHED, None, longer, lessons, TRAINING_TOKENS, place, progress
                    )
                    compressed, begun, healing = done.compressed, done.begun, done.record
        if steps:
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
                    "surveyed": surveyed.tokens if surveyed is not None and chosen.surveys else 0,
                }
            ),
            measures=measures(model, calibration, windows, seen, choice.importance),
            healing=healing,
            environment=environment(model),
        )
        if not first:
            return run
        run = proven(run, model, cut, compressed, plan, texts, max_new_tokens, clock, progress, begun)
        run = run.model_copy(update={"seconds": clock.seconds})
        with building(out, overwrite) as folder, stored_as(compressed, model.stored):
            save(compressed, model.anatomy, plan, Path(folder), tokenizer, model.loaded.folder)
            write_down(run, Path(folder))
        shutil.rmtree(place, ignore_errors=True)
    return run


def _params(share: float) -> Budget:
    return Budget.parse(f"params={share:.4f}")


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


def _way(recipe: Recipe, heal: Heal | None) -> str:
    """Where the new weights of what is left come from: the act of a recipe that combines blocks, or a way to heal."""
    if recipe.unit == "weight":
        if heal not in (None, "none", "eora"):
            raise InputError(f"--heal {heal} would fill the zeros of recipe {recipe.name} again; take eora or none")
        return heal or recipe.heal
    if heal == "eora":
        raise InputError(
            f"--heal eora puts paths beside linears that lost single weights; recipe {recipe.name} takes none"
        )
    if (recipe.trains or recipe.learns_ranks) and heal not in (None, "none"):
        raise InputError(f"recipe {recipe.name} trains what is left itself; leave out --heal {heal}")
    if heal == "scales" and not recipe.wide:
        raise InputError(f"recipe {recipe.name} drops {recipe.unit}s: {NOTHING}")
    if recipe.act == "drop":
        return heal or recipe.heal
    if recipe.act == "share":
        if heal not in (None, "none"):
            raise InputError(f"recipe {recipe.name} has blocks share weights, which --heal {heal} would part again")
        return "none"
    if heal not in (None, "none"):
        raise InputError(f"recipe {recipe.name} makes new weights itself (act {recipe.act}); leave out --heal {heal}")
    return recipe.act


def _posed(candidates: Sequence[Recipe], outline: Outline, budget: Budget, target: Target) -> tuple[Recipe, Task]:
    """The first recipe that can meet the budget on this model, and the task it has. InputError of the last one where
    none can."""
    *others, last = candidates
    for recipe in others:
        try:
            return recipe, pose_for(recipe, outline, budget, target)
        except InputError:
            continue
    return last, pose_for(last, outline, budget, target)


def _settled(
    recipe: str | os.PathLike[str] | None, target: str | None, budget: Budget
) -> tuple[tuple[Recipe, ...], Target]:
    """The recipes that may be taken and the target, each following from the other where only one is given."""
    aim = Target(target) if target is not None else None
    if recipe is None:
        names = catalogue.DEFAULTS_UNIFORM if aim is Target.UNIFORM else catalogue.DEFAULTS
        recipes = [catalogue.load(name) for name in names]
        if budget.until_cliff:  # width has no path of single steps
            recipes = [recipe for recipe in recipes if not recipe.wide]
        return tuple(recipes), aim or Target.REMOTE
    chosen = catalogue.load(recipe)
    require_cut(chosen)
    aim = aim or chosen.aim
    if aim in (Target.UNIFORM, Target.DECI) and chosen.act == "share":
        raise InputError(
            f"recipe {chosen.name} has blocks share weights, which target {aim} cannot carry; use target remote or any"
        )
    if aim is Target.UNIFORM and chosen.wide:
        if (
            isinstance(chosen.choice, BiMask | GroupSparse)
            or getattr(chosen.choice, "allocation", "uniform") != "uniform"
        ):
            raise InputError(
                f"recipe {chosen.name} leaves different widths, which target uniform cannot carry; use target "
                f"remote, or a recipe whose allocation is uniform"
            )
    elif aim is Target.UNIFORM and chosen.unit not in ("block", "weight", "channel"):
        raise InputError(
            f"recipe {chosen.name} drops {chosen.unit}s, which target uniform cannot carry: an ordinary checkpoint has "
            f"the same sublayers in every block; use target remote, or a recipe of whole blocks"
        )
    return (chosen,), aim
