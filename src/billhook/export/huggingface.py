"""Folders that plain transformers loads: an ordinary checkpoint, or one with a small file of remote code."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import transformers

from billhook import models
from billhook.anatomy import Anatomy, discover
from billhook.export import deci
from billhook.export.remote import ABSENT, MODULE, auto_classes, remote_code
from billhook.models.adapter import without
from billhook.models.quiet import quiet
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.target import Target
from billhook.surgery.checkpoint import Rewritten, rewrite
from billhook.surgery.form import Form, form_after, write_form
from billhook.surgery.live import drops_of, keeps_of, orders_of
from billhook.surgery.reopen import on_meta


def save(
    model: Any,
    anatomy: Anatomy,
    plan: Plan,
    folder: Path,
    tokenizer: Any | None = None,
    source_folder: Path | None = None,
) -> None:
    """Write a compressed model into an existing folder (wrap the call in ``models.building``).

    ``model`` is what ``surgery.apply`` made with ``plan``; ``anatomy`` is that of the dense model. Where only whole
    blocks are gone, and what got narrower did so everywhere in a way that plain config values say, the result is an
    ordinary checkpoint of the stock class, whatever the target. Otherwise the target decides: ``remote`` and ``any``
    get ``per_layer_config`` and remote code, ``deci`` the DeciLM form.

    Before anything is written the stock class is built from the new config, without weights, and must have exactly the
    tensors of ``model``, in name and shape; InputError with the difference otherwise. Paths of low rank are an adapter
    beside that checkpoint (``models.adapter``).
    """
    config = copy.deepcopy(model.config)
    drops, keeps = drops_of(plan, anatomy), keeps_of(plan, anatomy)
    form = form_after(config, drops, keeps, orders_of(plan, anatomy), anatomy, plan.factors)
    form = write_form(config, anatomy, form)
    with without(model):
        files = _dressed(config, model, anatomy, form, plan.target)
    models.save(model, tokenizer, folder, source_folder)
    config.architectures, config.dtype = model.config.architectures, model.config.dtype
    _put(files, config, folder)


def save_checkpoint(
    source: str | os.PathLike[str], plan: Plan, out: str | os.PathLike[str], overwrite: bool = False
) -> Path:
    """From a checkpoint on disk to a compressed one in the form of ``save``, without loading the model.

    Memory and errors are those of ``surgery.checkpoint.apply_to_checkpoint``."""
    with models.building(out, overwrite) as folder:
        write_checkpoint(models.locate(source), plan, folder)
    return Path(out)


def write_checkpoint(source: Path, plan: Plan, folder: Path) -> Rewritten:
    """As ``save_checkpoint``, from a folder into an existing empty one."""
    done = rewrite(source, plan, folder)
    _put(_dressed(done.small.config, done.small, done.anatomy, done.form, plan.target), done.small.config, folder)
    return done


def _dressed(config: Any, model: Any, anatomy: Anatomy, form: Form, target: Target) -> dict[str, Any]:
    """What goes beside the weights: file name -> Python source, or for ``config.json`` the values to change (``ABSENT``
    removes one). InputError if the stock class could not load the weights with it."""
    stock = type(model)
    if getattr(transformers, stock.__name__, None) is not stock:
        raise InputError(f"{stock.__name__} is not a class of transformers; a result in its form would not load")
    _check_same(on_meta(stock, copy.deepcopy(config)), model, stock.__name__)
    if not form:
        return {"config.json": {"auto_map": ABSENT}}
    if target is Target.UNIFORM:
        own = min((unit for unit, _ in (*form.widths, *form.ranks, *form.biases)), default=None)
        odd = f"has a form of its own in {own}" if own is not None else "has blocks that share weights"
        odd = f"lacks {min(form.skips)}" if form.skips else odd
        raise InputError(f"target uniform cannot carry this model: it already {odd}; use target remote or any")
    plain = copy.deepcopy(config)
    write_form(plain, anatomy, Form())
    full = on_meta(stock, plain)
    if target is Target.DECI:
        if form.ranks or form.biases:
            odd = "are in two parts" if form.ranks else "have a bias of their own"
            raise InputError(f"target deci cannot carry this model: linears of it {odd}")
        return deci.files(full, discover(full), form)
    names = auto_classes(config, stock.__name__)
    return {
        "config.json": {"auto_map": dict.fromkeys(names, f"{MODULE}.{stock.__name__}")},
        f"{MODULE}.py": remote_code(stock.__name__, discover(full), form),
    }


def _check_same(loaded: Any, model: Any, name: str) -> None:
    """Whether the tensors of what a loader would build are those of the model that is saved."""
    would, have = ({k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (loaded, model))
    for tensor in sorted({key for key, _ in would.items() ^ have.items()}):
        wants, has = (str(list(side[tensor])) if tensor in side else "nothing" for side in (would, have))
        raise InputError(
            f"the result would not load: {name} built from the new config wants {wants} for {tensor}, it has {has}"
        )


def _put(files: dict[str, Any], config: Any, folder: Path) -> None:
    """Write the files; of ``config.json`` only the given values differ from what transformers writes."""
    with quiet():
        config.save_pretrained(folder)
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8")) | files.pop("config.json")
    content = {key: value for key, value in content.items() if value is not ABSENT}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
