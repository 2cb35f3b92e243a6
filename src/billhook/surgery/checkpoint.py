"""A plan applied to a checkpoint on disk, without loading the model."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from safetensors import safe_open

from billhook.anatomy import Anatomy, discover
from billhook.anatomy.bridge import require_no_bridges
from billhook.models import building, copy_extras, fingerprint, locate
from billhook.models.adapter import require_none
from billhook.models.checks import read_config, weight_files
from billhook.models.quiet import quiet
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.visits import Orders
from billhook.surgery.apply import apply
from billhook.surgery.factorise import Factor, factors_of
from billhook.surgery.form import Form, form_after, write_form
from billhook.surgery.live import channels_of, drops_of, keeps_of, orders_of
from billhook.surgery.low_rank_experts import mixtures_of
from billhook.surgery.masks import masks_of, zeros_left
from billhook.surgery.names import live_names
from billhook.surgery.reopen import load, skeleton, stock_view
from billhook.surgery.shards import Headers, read_header, write_shard
from billhook.surgery.sharing import shared_after
from billhook.surgery.slices import narrowed, on_stream
from billhook.surgery.split import split, split_names
from billhook.surgery.thinning import thinned

_INDEX = "model.safetensors.index.json"


def apply_to_checkpoint(
    source: str | os.PathLike[str], plan: Plan | Iterable[Address], out: str | os.PathLike[str], overwrite: bool = False
) -> Path:
    """Write the checkpoint that loading ``source``, applying ``plan`` and saving would give, tensor for tensor.

    Memory: the headers and one chunk of one tensor, whatever the model's size (of a linear that becomes two: all of
    it). Time: that of copying the files. The
    tensors keep their own naming and dtype; only block numbers change. The head of another task stays behind, as in
    loading. Raises InputError, with nothing written, for a plan that is not possible, a corrupt or incomplete file, or
    a tensor of a block that has no place in the model.
    """
    with building(out, overwrite) as folder:
        rewrite(locate(source), plan, folder)
    return Path(out)


@dataclass(frozen=True)
class Rewritten:
    """``small`` is the compressed model on the meta device, ``anatomy`` that of the source, ``form`` what the new
    config lists as missing or narrower, ``left_out`` the stored weights that the model has no place for (see
    ``models.Loaded``), ``zeros`` how many weights of each sublayer the plan's masks set to zero."""

    small: Any
    anatomy: Anatomy
    form: Form
    left_out: tuple[str, ...]
    zeros: dict[Address, int]


def rewrite(source: Path, plan: Plan | Iterable[Address], folder: Path) -> Rewritten:
    """As ``apply_to_checkpoint``, into an existing empty folder."""
    require_none(source)
    with stock_view(source, read_config(source)) as view:
        files = weight_files(view)
        dense = skeleton(view)
        require_no_bridges(dense, str(source))
        anatomy = discover(dense)
        drops, keeps, factors = drops_of(plan, anatomy), keeps_of(plan, anatomy), factors_of(plan, anatomy)
        order = orders_of(plan, anatomy)
        if mixtures_of(plan, anatomy):
            raise InputError(
                "the plan takes experts apart, which goes by the weights of all of them at once: that is done on a "
                "loaded model, not on a checkpoint on disk"
            )
        small = apply(dense, anatomy, plan)
        masks = masks_of(plan, anatomy, dense)
        zeros = zeros_left(plan, anatomy, dense, keeps) if isinstance(plan, Plan) else {}
        form = form_after(small.config, drops, keeps, order, anatomy, [factor.edit for factor in factors])
        form = write_form(small.config, anatomy, form)

        headers = {path: read_header(path) for path in files}
        live, left_out = live_names(dense, _all_names(view, headers), str(source))
        moves = moved(live, anatomy, drops, order)
        _account(moves, dense, small, anatomy, drops, order, factors)
        headers, moves = narrowed(thinned(headers, live, dense, masks), moves, live, dense, anatomy, keeps)
        headers = on_stream(headers, live, dense, anatomy, channels_of(plan, anatomy))
        _write(folder, *split(headers, moves, live, dense, factors))
        _write_config(small.config, folder)
        copy_extras(source, folder)
    return Rewritten(small, anatomy, form, left_out, zeros)


def checkpoint_fingerprint(folder: Path) -> str:
    """What ``models.fingerprint`` says of the loaded model, read off the files a few values at a time.

    Only a checkpoint that keeps tensors other than experts in a form from which the model computes its own is loaded
    whole for it.
    """
    with stock_view(folder, read_config(folder)) as view:
        files = weight_files(view)
        model = skeleton(view)
        stored = {name: path for path in files for name in read_header(path)[0]}
        found = {live: name for name, live in live_names(model, stored, str(folder))[0].items()}
        for pair in model.all_tied_weights_keys.items():
            if known := [found[name] for name in pair if name in found]:
                found |= dict.fromkeys(pair, known[0])
        opened: dict[Path, Any] = {path: safe_open(path, framework="pt") for path in files}
        tensors = {}
        for name, parameter in model.named_parameters():
            if ".experts." not in name:
                tensor = opened[stored[found[name]]].get_tensor(found[name]) if name in found else None
                if tensor is None or tensor.shape != parameter.shape:
                    return fingerprint(load(folder).model)
                tensors[name] = tensor
        return fingerprint(cast(Any, SimpleNamespace(named_parameters=tensors.items)))


def moved(
    live: Mapping[str, str | None], anatomy: Anatomy, drops: frozenset[Address], orders: Orders
) -> dict[str, str | None]:
    """Stored name -> stored name in the smaller model, None where the tensor goes. ``live`` maps stored to live names.

    A stored name keeps its form; its first part that is the old number of its block becomes the new one (of a block
    that runs more than once, the first one). What the model
    ignores on purpose (multi-token prediction blocks, stale buffers) stays behind, as when a loaded model is saved.
    """
    cut = tuple(f"{cut.path}." for a in drops if a.sublayer is not None for cut in anatomy.sublayer(a).cuts)
    places = [
        (f"{stack.path}.", {old: orders[stack.name].index(old) for old in orders[stack.name]})
        for stack in anatomy.stacks
    ]

    def move(name: str, live_name: str | None) -> str | None:
        if live_name is None or live_name.startswith(cut):
            return None
        for path, numbers in places:
            if live_name.startswith(path):
                old = int(live_name.removeprefix(path).partition(".")[0])
                return _renumbered(name, old, numbers[old]) if old in numbers else None
        return name

    return {name: move(name, live_name) for name, live_name in live.items()}


def _renumbered(name: str, old: int, new: int) -> str:
    parts = name.split(".")
    parts[parts.index(str(old))] = str(new)
    return ".".join(parts)


def _all_names(folder: Path, headers: Headers) -> set[str]:
    """The names of all stored tensors. InputError if one is stored twice, or is in the index and in no file."""
    count = Counter(name for tensors, _ in headers.values() for name in tensors)
    if twice := [name for name, times in count.items() if times > 1]:
        raise InputError(f"{folder}: tensor {min(twice)} is in more than one file")
    if (folder / _INDEX).is_file() and len(headers) > 1:
        indexed = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        if lost := indexed.keys() - count.keys():
            raise InputError(f"{folder / _INDEX} names tensor {min(lost)}, which is in none of its files")
    return set(count)


def _account(
    moves: dict[str, str | None],
    dense: Any,
    small: Any,
    anatomy: Anatomy,
    drops: frozenset[Address],
    orders: Orders,
    factors: tuple[Factor, ...],
) -> None:
    """Every tensor is either kept or belongs to what was dropped: the rule that moves stored tensors must turn the
    dense model's names into exactly those of the applied one, and no two tensors may end under one name."""
    own = {name: name for name in dense.state_dict()}
    paths = [factor.path for factor in factors]
    kept = set(split_names(moved(own, anatomy, drops, orders), own, paths).values()) - {None}
    again = {f"{anatomy.stack(a.stack).path}.{a.block}." for a in shared_after(orders)}
    wrong: set[Any] = kept ^ {name for name in small.state_dict() if not name.startswith(tuple(again))}
    wrong |= {name for name, times in Counter(moves.values()).items() if times > 1 and name is not None}
    if wrong:
        raise InputError(f"this {anatomy.family} checkpoint cannot be cut on disk: no account of tensor {min(wrong)}")


def _write(folder: Path, headers: Headers, moves: dict[str, str | None]) -> None:
    """One output file for each input file that still holds anything, in the same order."""
    shards = []
    for tensors, metadata in headers.values():
        kept = [(new, tensor) for name, tensor in tensors.items() if (new := moves[name]) is not None]
        if kept:
            shards.append((kept, metadata))
    if len(shards) == 1:
        kept, metadata = shards[0]
        write_shard(folder / "model.safetensors", kept, metadata)
        return
    weight_map: dict[str, str] = {}
    for number, (kept, metadata) in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / name, kept, metadata)
        weight_map |= {tensor: name for tensor, _ in kept}
    total = sum(tensor.size for kept, _ in shards for _, tensor in kept)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_config(config: Any, folder: Path) -> None:
    if getattr(config, "auto_map", None):
        del config.auto_map  # names code of the source, which does not come along
    with quiet():
        config.save_pretrained(folder)
