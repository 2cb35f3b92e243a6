"""``billhook restore``: a trained model, part of the way back to its base."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from billhook.evaluate import PROMPTS, evidence, generations, prepared, probes
from billhook.evaluate.causal import require_causal
from billhook.evaluate.probes import posed
from billhook.export.huggingface import save
from billhook.heal import Healing, scale_updates
from billhook.heal import restore as put_back
from billhook.heal.combining.restore import require_same, shares
from billhook.measure.characters import QUESTIONS, spellings
from billhook.models import building, check_out, fingerprint, stored_as
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan, Provenance
from billhook.plan.record import Returned, Run, SearchRecord
from billhook.plan.target import Target
from billhook.recipes import catalogue
from billhook.recipes.choices import Graded, RestoredSpan
from billhook.recipes.costs import costs_of
from billhook.recipes.heal import applied
from billhook.recipes.opened import Opened, Stopwatch, environment, opened, versions
from billhook.recipes.proof import judged_on, write_down
from billhook.recipes.workplace import claimed
from billhook.search.restored_span import restored_span

Progress = Callable[[str, int, int], None]


def restore(
    source: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: str | os.PathLike[str] = "restore-layers",
    calibration: str = "builtin",
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    max_new_tokens: int = 40,
    progress: Progress | None = None,
) -> Run:
    """Undo part of what training on top of ``base`` has done to a model, and leave the result in ``out``: a checkpoint
    of the same architecture and size, with its record, card and report.

    ``recipe``: one whose act is ``restore`` or ``scale``. Both models must have the same parameters. The result is
    judged against the model as it was, on the end of the ``calibration`` text and on another one (nothing is chosen on
    either), and not timed: it does the same work. Cost: the choice (see ``restored_span``) and the proof.
    """
    chosen = catalogue.load(recipe)
    if not chosen.returns:
        raise InputError(f"recipe {chosen.name} cuts and takes no base: use billhook compress, or recipe lines")
    for given in (source, base):
        check_out(out, overwrite, given)
    clock = Stopwatch()
    with clock.step("load"):
        model = opened(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        origin = opened(base, dtype=dtype, device=device, trust_remote_code=trust_remote_code, like=model)
    require_causal(model.model, "restore")
    require_same(model.model, origin.model)
    if fingerprint(model.model) == fingerprint(origin.model):
        raise InputError(f"{source} and its base {base} have the same weights: there is nothing to take back")
    for prompt in PROMPTS:
        prepared(model.model, model.tokenizer, prompt, max_new_tokens)
    posed(model.model, model.tokenizer)

    with claimed(out):
        texts = judged_on(model, calibration, (), seed, progress)
        with clock.step("search"):
            healing, returned, search = _chosen(chosen.name, chosen.choice, model, origin, progress)
        plan = Plan(
            target=Target.UNIFORM,
            provenance=Provenance(model=fingerprint(model.model), recipe=chosen.name, seed=seed, versions=versions()),
        )
        changed = applied(model, plan, healing)
        with clock.step("evidence"):
            found = evidence(model.model, changed, texts, progress=progress)
        with clock.step("probes"):
            answers = probes(model.model, changed, model.tokenizer, progress=progress)
        with clock.step("generations"):
            said = generations(model.model, changed, model.tokenizer, max_new_tokens=max_new_tokens)
        run = Run(
            model=os.fspath(source),
            outline=model.anatomy.outline,
            plan=plan,
            costs=costs_of(plan, model.anatomy.outline),
            search=search,
            returned=returned.model_copy(update={"base": os.fspath(base)}),
            evidence=found,
            probes=answers,
            generations=said,
            environment=environment(model),
            seconds=clock.seconds,
        )
        with building(out, overwrite) as folder, stored_as(changed, model.stored):
            save(changed, model.anatomy, plan, Path(folder), model.tokenizer, model.loaded.folder)
            write_down(run, Path(folder))
    return run


def _chosen(
    name: str, choice: Any, model: Opened, base: Opened, progress: Progress | None
) -> tuple[Healing, Returned, SearchRecord]:
    """The new weights, what there is to say of them, and the search that led to them."""
    if isinstance(choice, Graded):
        ends = choice.first, choice.last - choice.first
        healing = scale_updates(model.model, model.anatomy, base.model, *ends)
        kept = {str(block): share for block, share in shares(model.anatomy, *ends).items()}
        nothing = SearchRecord(recipe=name, objective="none", steps=(), work=0, evaluations=0)
        return healing, Returned(base="", kept=kept), nothing
    assert isinstance(choice, RestoredSpan)
    encoded = [prepared(model.model, model.tokenizer, question.text, 1)["input_ids"][0] for question in QUESTIONS]
    questions = {
        "input_ids": pad_sequence(encoded, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in encoded], batch_first=True),
    }
    spelt = spellings(model.tokenizer, model.model.get_output_embeddings().out_features)
    found = restored_span(model.model, model.anatomy, base.model, questions, spelt, choice.validity, progress)
    healing = put_back(model.model, model.anatomy, base.model, found.blocks)
    kept = {str(block): 0.0 if block in found.blocks else 1.0 for block in shares(model.anatomy)}
    returned = Returned(
        base="",
        kept=kept,
        validity=(found.before.validity, found.after.validity),
        diversity=(found.before.diversity, found.after.diversity),
    )
    objective = "diversity of random characters"
    record = SearchRecord(recipe=name, objective=objective, steps=(), work=found.work, evaluations=found.evaluations)
    return healing, returned, record
