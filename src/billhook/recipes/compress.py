"""``billhook compress``: the whole walk, from a model to a smaller one with its proof."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from billhook.data import Windows
from billhook.data import calibration as windows_of
from billhook.evaluate import PROMPTS, prepared
from billhook.evaluate.causal import require_causal
from billhook.evaluate.probes import posed
from billhook.export.huggingface import save
from billhook.heal import UNTOUCHED, require_healable
from billhook.heal.gains import require_gains
from billhook.heal.mask_tuning import NOTHING
from billhook.models import building, check_out, fingerprint, stored_as
from billhook.plan.budget import Budget
from billhook.plan.check import check_target
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan, Provenance
from billhook.plan.record import Run
from billhook.plan.target import Target
from billhook.recipes import catalogue
from billhook.recipes.costs import costs_of
from billhook.recipes.find import find, pose_for, require_path
from billhook.recipes.heal import healing_text, mended
from billhook.recipes.measures import measures, watch
from billhook.recipes.opened import Stopwatch, environment, opened, versions
from billhook.recipes.proof import judged_on, proven, write_down
from billhook.recipes.schema import TRAINED, Heal, Recipe, Widths
from billhook.recipes.selection import asked
from billhook.recipes.settings import CALIBRATION_LENGTH, CALIBRATION_TOKENS, TRAINING_TOKENS
from billhook.recipes.sharing import require_sharing
from billhook.recipes.workplace import claimed
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
    progress: Progress | None = None,
) -> Run:
    """Cut a model down to a budget (see ``Budget``) and leave checkpoint, record, card and report in ``out``.

    Without a ``target`` the result may be whatever the recipe's units make of it: an ordinary checkpoint for whole
    blocks (``uniform``), one with remote code for sublayers (``remote``). Without a ``recipe`` the best one for the
    target is taken; ``heal`` is what the recipe says unless told, and an act that combines blocks stands in its place.
    ``select``: which text a healing by training reads (see ``heal``).
    Everything that can be refused is refused before the search; an interrupted search goes on from its last finished
    evaluation when the same call is made again (its ledger lies beside ``out`` until then). Two runs cannot work on one
    ``out`` at once.
    """
    check_out(out, overwrite, source)
    limits = Budget.parse(budget)
    chosen, aim = _settled(recipe, target)
    require_path(chosen, limits)
    way = _way(chosen, heal)
    wanted = asked(select, way)
    clock = Stopwatch()
    with clock.step("load"):
        model = opened(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    outline = model.anatomy.outline
    check_target(aim, outline)
    require_causal(model.model, "compress")
    if way != "none":
        require_healable(model.anatomy)
    if way == "gains":
        require_gains(model.anatomy)
    problem = pose_for(chosen, outline, limits, aim)
    require_sharing(chosen, model, limits)
    tokenizer = model.tokenizer
    for prompt in PROMPTS:
        prepared(model.model, tokenizer, prompt, max_new_tokens)
    posed(model.model, tokenizer)

    with claimed(out) as place:
        with clock.step("measure"):
            windows = windows_of(
                calibration,
                tokenizer,
                tokens=CALIBRATION_TOKENS,
                length=model.length(CALIBRATION_LENGTH),
                seed=seed,
                model=model.model,
                progress=progress,
            )
            longer = healing_text(model, calibration, seed, progress) if way != "none" else None
            lessons: Windows | Selection | None = None
            if way in TRAINED:
                from billhook.recipes import training  # with peft and accelerate: seconds

                if wanted is None:
                    lessons = training.training_text(model, calibration, TRAINING_TOKENS, seed, place, progress)
                else:
                    lessons = training.selection(model, calibration, wanted, TRAINING_TOKENS, seed, place, progress)
            texts = judged_on(model, calibration, longer or windows, seed, progress)
            seen = watch(model, windows, progress)
        with clock.step("search"):
            choice = find(chosen, model, problem, windows, seen, seed=seed, place=place, progress=progress)

        plan = Plan.of(choice.found.drops, aim, choice.keeps).model_copy(
            update={
                "budget": str(limits),
                "schedule": choice.schedule,
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
        if longer is not None:
            with clock.step("heal"):
                if lessons is None:
                    compressed, healing = mended(model, plan, way, longer, progress)
                else:
                    done = training.taught(
                        model, plan, way, UNTOUCHED, None, longer, lessons, TRAINING_TOKENS, seed, place, progress
                    )
                    compressed, begun, healing = done.compressed, done.begun, done.record
        if healing is not None:
            healing = healing.model_copy(update={"text": calibration, "seed": seed})
        costs = costs_of(plan, outline)
        run = Run(
            model=os.fspath(source),
            outline=outline,
            plan=plan,
            asked=str(limits),
            realised={kind: cost.compressed / cost.dense for kind, cost in costs.items() if cost.dense},
            costs=costs,
            search=choice.record,
            measures=measures(model, calibration, windows, seen, choice.importance),
            healing=healing,
            environment=environment(model),
        )
        run = proven(run, model, cut, compressed, plan, texts, max_new_tokens, clock, progress, begun)
        run = run.model_copy(update={"seconds": clock.seconds})
        with building(out, overwrite) as folder, stored_as(compressed, model.stored):
            save(compressed, model.anatomy, plan, Path(folder), tokenizer, model.loaded.folder)
            write_down(run, Path(folder))
        shutil.rmtree(place, ignore_errors=True)
    return run


def _way(recipe: Recipe, heal: Heal | None) -> str:
    """Where the new weights of what is left come from: the act of a recipe that combines blocks, or a way to heal."""
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


def _settled(recipe: str | os.PathLike[str] | None, target: str | None) -> tuple[Recipe, Target]:
    """The recipe and the target, each following from the other where only one is given."""
    aim = Target(target) if target is not None else None
    if recipe is None:
        chosen = catalogue.load(catalogue.DEFAULT_UNIFORM if aim is Target.UNIFORM else catalogue.DEFAULT)
    else:
        chosen = catalogue.load(recipe)
    if aim is None:
        aim = Target.UNIFORM if chosen.unit == "block" and chosen.act != "share" else Target.REMOTE
    if aim in (Target.UNIFORM, Target.DECI) and chosen.act == "share":
        raise InputError(
            f"recipe {chosen.name} has blocks share weights, which target {aim} cannot carry; use target remote or any"
        )
    if aim is Target.UNIFORM and isinstance(chosen.choice, Widths):
        if chosen.choice.allocation != "uniform":
            raise InputError(
                f"recipe {chosen.name} leaves different widths, which target uniform cannot carry; use target "
                f"remote, or a recipe whose allocation is uniform"
            )
    elif aim is Target.UNIFORM and chosen.unit != "block":
        raise InputError(
            f"recipe {chosen.name} drops {chosen.unit}s, which target uniform cannot carry: an ordinary checkpoint has "
            f"the same sublayers in every block; use target remote, or a recipe of whole blocks"
        )
    return chosen, aim
