"""Which entries of the tensors in a checkpoint stay when sublayers get narrower."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from billhook.anatomy import Anatomy
from billhook.plan.errors import InputError
from billhook.plan.plan import HiddenChannels, Keep
from billhook.surgery.narrow import inner_of, kept_entries
from billhook.surgery.shards import FLOATS, Headers, Stored
from billhook.surgery.thin import scalings

_EXPERT = re.compile(r"(?<=\.experts\.)[0-9]+(?=\.)")


def narrowed(
    headers: Headers,
    moves: Mapping[str, str | None],
    live: Mapping[str, str | None],
    dense: Any,
    anatomy: Anatomy,
    keeps: Iterable[Keep],
) -> tuple[Headers, dict[str, str | None]]:
    """The same tensors with a note of what stays of each, and their new names.

    Experts that are stored one by one, where the model has them in one tensor, are kept or dropped whole and numbered
    anew. InputError for any other tensor that is not stored in the shape in which the model has it.
    """
    kept: dict[str, tuple[int, list[int]]] = {}
    experts: dict[str, tuple[int, ...]] = {}
    for keep in keeps:
        inner = inner_of(anatomy, keep)
        kept |= kept_entries(inner, keep.indices)
        if inner.kind == "expert":
            experts |= {piece.parameter: keep.indices for piece in inner.slices}
    shapes = {name: tuple(tensor.shape) for name, tensor in dense.state_dict().items() if name in kept}
    moves = dict(moves)

    def note(stored: Stored) -> Stored:
        name = live[stored.name]
        new = moves[stored.name]
        if name not in kept or new is None:
            return stored
        if stored.shape == shapes[name]:
            axis, entries = kept[name]
            return replace(stored, kept=((axis, tuple(entries)),))
        single = _EXPERT.search(new)
        if single is None or name not in experts:
            raise InputError(
                f"{stored.file}: {stored.name} is stored as {list(stored.shape)}, which the model keeps as "
                f"{list(shapes[name])}; it cannot be narrowed on disk"
            )
        number = int(single[0])
        left = experts[name]
        moves[stored.name] = _EXPERT.sub(str(left.index(number)), new, count=1) if number in left else None
        return stored

    noted = {path: ({n: note(s) for n, s in tensors.items()}, extra) for path, (tensors, extra) in headers.items()}
    return noted, moves


def on_stream(
    headers: Headers, live: Mapping[str, str | None], dense: Any, anatomy: Anatomy, edits: Iterable[HiddenChannels]
) -> Headers:
    """The same tensors with a note of the hidden channels that stay of each, and of what becomes of their entries.

    InputError for one that is not stored in the shape in which the model has it, experts that are stored one by one
    aside."""
    kept: dict[str, tuple[int, tuple[int, ...]]] = {}
    each: dict[str, Any] = {}
    for edit in edits:
        residual = anatomy.residuals[edit.stack]
        kept |= {name: (axis, edit.indices) for name, axis in residual.axes}
        each |= scalings(residual, len(edit.indices))
    shapes = {name: tuple(tensor.shape) for name, tensor in dense.state_dict().items() if name in kept}

    def note(stored: Stored) -> Stored:
        name = live[stored.name]
        if name not in kept:
            return stored
        (axis, entries), shape = kept[name], shapes[name]
        single = bool(_EXPERT.search(stored.name)) and len(stored.shape) == len(shape) - 1
        place = axis - 1 if single else axis
        if not (stored.shape == shape or (single and stored.shape[place] == shape[axis])):
            raise InputError(
                f"{stored.file}: {stored.name} is stored as {list(stored.shape)}, which the model keeps as "
                f"{list(shape)}; its hidden channels cannot be cut on disk"
            )
        if name in each and stored.dtype not in FLOATS:
            raise InputError(f"{stored.file}: {stored.name} is stored as {stored.dtype}: no scale fits in on disk")
        return replace(stored, kept=(*stored.kept, (place, entries)), each=each.get(name))

    return {path: ({n: note(s) for n, s in tensors.items()}, extra) for path, (tensors, extra) in headers.items()}
