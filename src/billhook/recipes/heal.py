"""``billhook heal``, and the healing of the other walks: new weights for what a cut left."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from billhook.anatomy import Anatomy
from billhook.anatomy.bridge import BRIDGE, require_no_bridges
from billhook.data import Windows
from billhook.evaluate import PROMPTS, prepared
from billhook.evaluate.causal import require_causal
from billhook.evaluate.probes import posed
from billhook.export.huggingface import save
from billhook.heal import (
    UNTOUCHED,
    Healing,
    average,
    branch_gains,
    bridge,
    closed_form,
    flatten,
    fuse,
    mask_tuning,
    merge,
    require_healable,
)
from billhook.heal.combining.features import merged_features
from billhook.heal.gaps import require_own_weights
from billhook.heal.healing import carried_out, require_no_masks
from billhook.heal.held import parted
from billhook.heal.judge import judged_apart
from billhook.heal.refit.bias import bias_compensation
from billhook.heal.refit.data_free import data_free
from billhook.heal.refit.eora import eora, require_only_masks
from billhook.heal.refit.low_rank import rejoined, require_linears
from billhook.heal.refit.widths import original_names, whole
from billhook.models import building, check_out, dtype_of, fingerprint, stored_as
from billhook.plan import processes
from billhook.plan.errors import InputError
from billhook.plan.heals import TRAINED, Heal
from billhook.plan.outline import Outline
from billhook.plan.plan import Plan
from billhook.plan.record import HealRecord, HealStep, Run
from billhook.plan.target import Target
from billhook.recipes.costs import costs_of, of_dense
from billhook.recipes.evaluate import calibrated_with, pair, recorded
from billhook.recipes.opened import Opened, Stopwatch, environment
from billhook.recipes.proof import judged_on, proven, write_down
from billhook.recipes.selection import asked, require_one_text
from billhook.recipes.settings import TRAINING_TOKENS
from billhook.recipes.texts import healing_text
from billhook.recipes.together import shared
from billhook.surgery import apply
from billhook.surgery.biases import note_biases
from billhook.surgery.checkpoint import checkpoint_fingerprint
from billhook.surgery.factorise import factors_of
from billhook.surgery.live import channels_of, drops_of, keeps_of
from billhook.surgery.ranks import note_bridges

Progress = Callable[[str, int, int], None]


def _average(model: Any, anatomy: Anatomy, plan: Plan, windows: Windows, progress: Progress | None) -> Healing:
    return average(model, anatomy, plan)


def _merge(model: Any, anatomy: Anatomy, plan: Plan, windows: Windows, progress: Progress | None) -> Healing:
    neurons = any(keep.inner == "neuron" for keep in plan.keeps)
    return (merged_features if neurons else merge)(model, anatomy, plan, windows, progress)


METHODS: Mapping[str, Callable[[Any, Anatomy, Plan, Windows, Progress | None], Healing]] = {
    "closed-form": closed_form,
    "bridge": bridge,
    "bias": judged_apart(bias_compensation),
    "data-free": judged_apart(data_free),
    "scales": mask_tuning,
    "average": _average,
    "fuse": fuse,
    "flatten": flatten,
    "gains": branch_gains,
    "merge": _merge,
}
"""Where new weights for what is left come from, by the words of a recipe (``heal`` and ``act``)."""


def heal(
    source: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    method: Heal = "distill",
    against: str | os.PathLike[str] | None = None,
    calibration: str | None = None,
    select: str = "none",
    tokens: int = TRAINING_TOKENS,
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    max_new_tokens: int = 40,
    progress: Progress | None = None,
) -> Run:
    """Heal a result of Billhook further, and leave the better model in ``out`` with its proof.

    ``source`` is a folder that Billhook wrote: its record says what was cut from which model (``against`` where that
    lies elsewhere now) and on what text (unless ``calibration`` names another). What was never healed is refitted in
    closed form, unless masks have zeros to keep, before it is trained on ``tokens`` tokens. Of all that comes by,
    ``source`` as it is included, the best on held-back text is kept.

    ``select`` says which of the text is read: all of it (``none``), or selected by a word of ``heal.selecting``, with
    the text it is to be like where the word needs one (``dsir:SOURCE``); else that is the text of the record.

    An interrupted training goes on from its last look at held-back text when the same call is made again. Under
    ``accelerate launch`` its processes share the training (see ``heal.training.train``) and the refit (see
    ``closed_form``); the first one alone proves and writes the result, and what the others return is without proof.
    """
    from billhook.heal.selecting.select import Selection
    from billhook.recipes import training  # with peft and accelerate: seconds that others need not wait

    device = processes.local(device)
    require_sharable(method)
    check_out(out, overwrite, source)
    if tokens < 1 or method == "none":
        raise InputError("nothing to heal with: give a method and at least 1 token")
    if not Path(source).expanduser().is_dir():
        raise InputError(f"{source} is no folder; heal takes one with a cut model that Billhook wrote")
    known = recorded(source)
    if known is None or known.plan.empty:
        raise InputError(
            f"{source} is not a cut model with a record that Billhook wrote; only such a one can be healed"
        )
    plan, origin = known.plan, against or known.model
    require_units(method, plan)
    require_own_weights(plan)
    if method == "eora":
        require_only_masks(plan)
    elif method != "tune":  # what it does to linears leaves zeros as they are
        require_no_masks(plan, method)
    if known.healing and known.healing.paths:
        raise InputError(f"{source} has paths beside its linears already; heal the one from before")
    if known.healing and known.healing.training and method not in TRAINED:
        raise InputError(
            f"{source} was trained ({known.healing.method}), and {method} has its place before that: heal the one from "
            f"before, or train further"
        )
    if plan.factors and method != "closed-form":
        raise InputError(f"{source} has linears in two parts, which {method} cannot train; use closed-form")
    check_out(out, overwrite, origin)
    calibrated_on = calibrated_with(source)[0]
    text_name = calibration or calibrated_on
    wanted = asked(select, method, calibrated_on, text_name)
    require_one_text(wanted, text_name)
    done_before = known.healing.steps if known.healing else ()
    step = HealStep(
        method=method,
        text=text_name,
        seed=seed,
        tokens=tokens if method in TRAINED else None,
        select="" if wanted is None else select,
    )
    clock = Stopwatch()
    with clock.step("load"):
        try:
            small, model = pair(source, origin, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        except InputError as error:
            if against is not None or str(origin) not in str(error):
                raise
            raise InputError(
                f"{error} (the dense model, says the record; --against names it where it is now)"
            ) from error
    if plan.provenance.model and plan.provenance.model not in names_of(model):
        raise InputError(f"{source} was cut from another model than {origin}: their fingerprints differ")
    require_no_bridges(model.model, str(origin))
    require_causal(model.model, "heal")
    require_healable(model.anatomy)
    require_linears(plan, model.anatomy)
    for prompt in PROMPTS:
        prepared(model.model, model.tokenizer, prompt, max_new_tokens)
    posed(model.model, model.tokenizer)
    start = differing(small.model, model, plan, source)
    del small

    with shared(out, device) as (place, first):
        with clock.step("measure"):
            text: HealRecord | Windows
            if method in TRAINED and (known.healing or plan.sparsities):  # nothing is refitted, zeros least of all
                text = known.healing or record_of(start)
            else:
                text = healing_text(model, text_name, seed, progress)
            lessons: Windows | Selection | None = None
            if wanted is not None:
                lessons = training.selection(model, text_name, wanted, tokens, seed, place, progress)
            elif method in TRAINED:
                lessons = training.training_text(model, text_name, tokens, seed, place, progress)
            taken = lessons.windows if isinstance(lessons, Selection) else lessons
            reads = [windows for windows in (text, taken) if isinstance(windows, Windows)]
            texts = judged_on(model, text_name, reads, seed, progress, read_before=calibrated_with(source))
        cut = apply(model.model, model.anatomy, plan)
        begun = None
        with clock.step("heal"):
            if lessons is not None:
                done = training.taught(model, plan, step, start, text, lessons, tokens, place, progress)
                compressed, begun, healing = done.compressed, done.begun, done.record
            else:
                assert isinstance(text, Windows)
                refit = new_weights(model, plan, method, text, progress, start)
                best = training.better(model, plan, start, refit, parted(text)[1])
                steps = (*done_before, step) if method == "eora" else (step,)  # all others begin at the dense weights
                compressed, healing = applied(model, plan, best), record_of(best, *steps)
                if best is start:
                    healing = in_vain(known.healing, step) or healing.model_copy(update={"refused": True})
                if best.beside or start.beside:
                    known = known.model_copy(update=cost_fields(plan, known.outline, best))
        run = known.model_copy(
            update={"model": os.fspath(origin), "healing": healing, "environment": environment(model)}
        )
        if not first:
            return run
        run = proven(run, model, cut, compressed, plan, texts, max_new_tokens, clock, progress, begun)
        run = run.model_copy(update={"seconds": clock.seconds})
        with building(out, overwrite) as folder, stored_as(compressed, model.stored):
            save(compressed, model.anatomy, plan, Path(folder), model.tokenizer, model.loaded.folder)
            write_down(run, Path(folder))
        shutil.rmtree(place, ignore_errors=True)
    return run


def names_of(model: Opened) -> Iterator[str]:
    """The fingerprints of a model: as it was loaded, and, since float16 rounds otherwise, as it is stored."""
    yield fingerprint(model.model)
    yield checkpoint_fingerprint(model.loaded.folder)


def in_vain(known: HealRecord | None, step: HealStep) -> HealRecord | None:
    """What was on record of a model that stays as it is, since one more way to heal it brought it no nearer."""
    return known and known.model_copy(update={"in_vain": (*known.in_vain, step)})


def require_sharable(method: str) -> None:
    """InputError where several processes were started for a way to heal that they cannot share."""
    if processes.count() > 1 and method not in ("closed-form", "bridge", *TRAINED):
        raise InputError(
            f"several processes were started, and they share a healing by training or in closed form, which {method} "
            f"is not; start one"
        )


def require_units(method: str, plan: Plan) -> None:
    """InputError where there is nothing that a way to heal could take hold of."""
    if plan.channels and method != "closed-form":
        raise InputError(f"the plan cuts hidden channels, which {method} knows nothing of; use closed-form")
    if method in ("scales", "bias", "data-free") and not plan.keeps:
        raise InputError(f"{method} is for what a narrowing leaves, and this plan narrows nothing; use closed-form")
    if method == "bridge" and plan.target in (Target.UNIFORM, Target.DECI):
        raise InputError(
            f"a bridge is no part of the model's own class, which target {plan.target} asks for; cut with target "
            f"remote or any"
        )
    if method == "bias" and plan.target in (Target.UNIFORM, Target.DECI):
        raise InputError(f"bias gives linears a bias of their own, which target {plan.target} cannot carry")


def differing(small: Any, model: Opened, plan: Plan, name: object) -> Healing:
    """The weights of a cut model that are not those of the dense one, by name in the dense one. InputError where the
    two do not fit together."""
    cut = apply(model.model, model.anatomy, plan)
    factors = factors_of(plan, model.anatomy)
    old, new = (dict(side.named_parameters()) for side in (cut, small))
    more = {name for name in new.keys() - old.keys() if name.endswith(".bias") or f".{BRIDGE}." in name}
    if old.keys() != new.keys() - more or any(old[key].shape != new[key].shape for key in old):
        raise InputError(f"{name} has other weights than its plan leaves of {model.loaded.source}")
    names = original_names(model.anatomy, drops_of(plan, model.anatomy), new)
    changed = (key for key in new if key in more or not torch.equal(old[key], new[key]))
    found = {names[key]: new[key].detach() for key in changed}
    found = rejoined(model.model, factors, found)
    keeps, channels = keeps_of(plan, model.anatomy), channels_of(plan, model.anatomy)
    return Healing(whole(model.model, model.anatomy, keeps, found, channels), (), {}, 0, 0)


def new_weights(
    model: Opened,
    plan: Plan,
    method: str,
    windows: Windows,
    progress: Progress | None,
    start: Healing = UNTOUCHED,
) -> Healing:
    """By a way to heal in closed form, or an act that combines blocks. ``start``: weights that came with masks."""
    if method == "eora":
        return eora(model.model, model.anatomy, plan, start, windows, progress)
    return METHODS[method](model.model, model.anatomy, plan, windows, progress)


def applied(model: Opened, plan: Plan, healing: Healing) -> Any:
    """The cut model with the tensors of a healing as its own; the dense model stays as it is."""
    healing = storable(model, healing)
    known = dict(model.model.named_parameters(remove_duplicate=False))
    compressed = carried_out(model.model, model.anatomy, plan, healing)
    added = [name for name in healing.tensors if name not in known and name.endswith(".bias")]
    note_biases(compressed.config, model.anatomy, added)
    note_bridges(compressed.config, model.anatomy, healing.bridges)
    return compressed


def storable(model: Opened, healing: Healing) -> Healing:
    """The new weights rounded as the checkpoint will hold them: what is proven is what is saved."""
    if dtype_of(model.model) == model.stored:
        return healing
    rounded = {name: tensor.to(model.stored).to(tensor.dtype) for name, tensor in healing.tensors.items()}
    paths = {name: (a.to(model.stored), b.to(model.stored)) for name, (a, b) in healing.paths.items()}
    return replace(healing, tensors=rounded, paths=paths)


def cost_fields(plan: Plan, outline: Outline, healing: Healing) -> dict[str, Any]:
    """The fields of a record that say what a model costs, with its paths."""
    costs = costs_of(plan, outline, beside=healing.beside)
    return {"costs": costs, "realised": of_dense(costs)}


def record_of(healing: Healing, *steps: HealStep) -> HealRecord:
    """What there is to say of new weights, after all that was done one after the other."""
    return HealRecord(
        steps=steps,
        tokens=healing.tokens,
        work=healing.work,
        refits=healing.refits,
        left_alone=dict(healing.left_alone),
        divergence=None if healing.cut is None or healing.healed is None else (healing.cut, healing.healed),
        grafts=healing.grafts,
        paths={name: len(a) for name, (a, _) in healing.paths.items()},
        bridges=healing.bridges,
        refused=healing.refused,
    )
