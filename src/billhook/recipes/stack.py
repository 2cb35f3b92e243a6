"""``billhook stack`` and ``billhook unstack``: one file for every size, and a checkpoint of the first part of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from billhook.export import bit_stack
from billhook.models import check_out, stored_as
from billhook.plan.budget import Budget
from billhook.plan.errors import InputError
from billhook.recipes.opened import opened
from billhook.recipes.texts import healing_text

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sizes:
    """Bytes of a stack: what is ``always`` needed, what was ``read`` of it, and the ``whole``."""

    always: int
    read: int
    whole: int


def stack(
    source: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    calibration: str = "builtin",
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Sizes:
    """Write a model into the folder ``out`` as a stack (see ``export.bit_stack``), its inputs weighed on the text
    ``calibration``, its other tensors in the dtype of the checkpoint unless told."""
    check_out(out, overwrite, source)
    model = opened(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    windows = healing_text(model, calibration, seed, progress)
    with stored_as(model.model, model.stored):
        bit_stack.stack(
            model.model,
            model.anatomy,
            windows,
            out,
            tokenizer=model.tokenizer,
            overwrite=overwrite,
            progress=progress,
        )
    always, whole = bit_stack.sizes(out)
    return Sizes(always, whole, whole)


def unstack(
    source: str | os.PathLike[str], *, budget: str, out: str | os.PathLike[str], overwrite: bool = False
) -> Sizes:
    """Make an ordinary checkpoint in ``out`` of as much of a stack as a ``budget`` of size allows: bytes with a unit
    (``size=100MB``), or a share of the whole stack (``size=0.5``)."""
    limits = Budget.parse(budget).limits
    if [limit.kind for limit in limits] != ["size"]:
        raise InputError(f"budget {budget}: a stack is read up to a size alone; give size=100MB or size=0.5")
    always, whole = bit_stack.sizes(source)
    (limit,) = limits
    size = int(limit.amount * whole if limit.relative else limit.amount)
    return Sizes(always, bit_stack.unstack(source, out, size=size, overwrite=overwrite), whole)
