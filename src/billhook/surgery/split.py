"""Linears of a checkpoint taken apart: which tensors become two, and under which names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from billhook.anatomy.low_rank import is_conv
from billhook.plan.errors import InputError
from billhook.surgery.factorise import Factor, parts
from billhook.surgery.shards import FLOATS, Headers, Made, Stored

_PARTS = ("reduce", "expand")


def split(
    headers: Headers,
    moves: Mapping[str, str | None],
    live: Mapping[str, str | None],
    dense: Any,
    factors: Iterable[Factor],
) -> tuple[Headers, dict[str, str | None]]:
    """The same tensors, each weight that is taken apart there twice with a note of how either part is made of it, and
    their new names. InputError for one that is not stored in the shape and in a type in which the model has it."""
    found = {f"{factor.path}.weight": factor for factor in factors}

    def divided(stored: Stored) -> list[Stored]:
        name = live[stored.name]
        factor = found.get(name or "")
        if factor is None or moves[stored.name] is None:
            return [stored]
        shape = tuple(dense.get_parameter(name).shape)
        if stored.shape != shape or stored.dtype not in FLOATS:
            raise InputError(
                f"{stored.file}: {stored.name} is stored as {list(stored.shape)} {stored.dtype}, which the model keeps "
                f"as {list(shape)}; it cannot be taken apart on disk"
            )
        turned = is_conv(dense.get_submodule(factor.path))
        rows, columns = reversed(shape) if turned else shape
        shapes = ((factor.edit.rank, columns), (rows, factor.edit.rank))
        return [
            replace(stored, name=_key(stored.name, part), made=Made(size, partial(_part, factor.basis, turned, number)))
            for number, (part, size) in enumerate(zip(_PARTS, shapes, strict=True))
        ]

    noted = {
        path: ({part.name: part for stored in tensors.values() for part in divided(stored)}, extra)
        for path, (tensors, extra) in headers.items()
    }
    return noted, split_names(moves, live, [factor.path for factor in factors])


def split_names(
    moves: Mapping[str, str | None], live: Mapping[str, str | None], paths: Iterable[str]
) -> dict[str, str | None]:
    """Stored name -> new name, a weight that is taken apart being there once for each part."""
    weights, biases = ({f"{path}.{leaf}" for path in paths} for leaf in ("weight", "bias"))
    named: dict[str, str | None] = {}
    for name, new in moves.items():
        if new is not None and live[name] in weights:
            named |= {_key(name, part): f"{new.removesuffix('.weight')}.{part}.weight" for part in _PARTS}
        elif new is not None and live[name] in biases:
            named[name] = f"{new.removesuffix('.bias')}.expand.bias"
        else:
            named[name] = new
    return named


def _key(name: str, part: str) -> str:
    return f"{name} {part}"


def _part(basis: Tensor, turned: bool, number: int, weight: Tensor) -> Tensor:
    return parts(weight.T if turned else weight, basis)[number]
