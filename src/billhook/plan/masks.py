"""Masks of single weights: their patterns, their packed form, and whether a plan may have them."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.outline import Outline
from billhook.plan.plan import Plan

Packed = NDArray[np.uint8]
_PATTERN = re.compile(r"([1-9][0-9]?):([1-9][0-9]?)")


def parse_pattern(text: str) -> tuple[int, int] | None:
    """(N, M) of ``N:M``: at most N of M weights in a row stay. None for ``unstructured``; InputError for the rest."""
    found = _PATTERN.fullmatch(text)
    if text == "unstructured":
        return None
    if not found or int(found[1]) >= int(found[2]):
        raise InputError(f"pattern {text!r} is neither unstructured nor of the form N:M with N below M (such as 2:4)")
    return int(found[1]), int(found[2])


def pack(kept: NDArray[Any]) -> Packed:
    """Eight weights a byte along the last axis, 1 for those that stay: [..., n] -> [..., n / 8 rounded up]."""
    return np.packbits(kept.astype(bool), axis=-1)


def unpack(packed: Packed, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The mask of a tensor of this shape. InputError where it is that of another one."""
    wanted = (*shape[:-1], -(-shape[-1] // 8))
    if packed.dtype != np.uint8 or packed.shape != wanted:
        raise InputError(f"a mask of {list(packed.shape)} bytes does not fit a weight of shape {list(shape)}")
    return np.unpackbits(packed, axis=-1, count=shape[-1]).astype(bool)


def check_masks(plan: Plan, drops: Collection[Address], outline: Outline) -> None:
    """Raise InputError with the reason if a sparsify of the plan cannot be carried out on this model. Whether masks fit
    their weights is seen when they meet them."""
    sublayers = dict(outline.sublayers())
    seen: set[Address] = set()
    for edit in plan.sparsities:
        if edit.unit not in sublayers:
            raise InputError(f"unit {edit.unit} is no sublayer of this {outline.family} model")
        if edit.unit in seen:
            raise InputError(f"the plan makes {edit.unit} sparse twice; one mask says it all")
        if edit.unit in drops or edit.unit.parent in drops:
            raise InputError(f"unit {edit.unit} is both dropped and made sparse; a plan does one of them")
        seen.add(edit.unit)
        for linear in edit.zeros:
            if edit.array(linear) not in plan.arrays:
                raise InputError(f"the plan names the array {edit.array(linear)}, which is not in the file beside it")
