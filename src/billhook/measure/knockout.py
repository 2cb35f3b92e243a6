"""What the output misses when one head group is silenced, or given what it does in another text: one pass for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from billhook.anatomy.types import Anatomy, Inner
from billhook.data import Windows
from billhook.measure.patch import hooked_before, observing
from billhook.plan.address import Address
from billhook.plan.errors import InputError

Progress = Callable[[str, int, int], None]
By = Literal["zero", "interchange"]
TOKENS_AT_ONCE = 2048


def knockout(
    model: nn.Module,
    anatomy: Anatomy,
    units: Mapping[Address, Inner],
    windows: Windows,
    by: By = "interchange",
    progress: Progress | None = None,
) -> dict[Address, Tensor]:
    """For each inner unit the divergence of the next-token distributions from the dense model's, in nats a token, when
    what the unit hands to the linear that writes is replaced: by 0 (``zero``), or by what it hands on at the same
    place of another window (``interchange``), which leaves its usual size and takes away only what it knows of the
    text. float64 [units] on the CPU.

    Cost: a forward pass for each unit, and one of the dense model. Memory: twice the logits of a few windows. Raises
    InputError for a model that gives no next-token logits, and for fewer than two windows to interchange.
    """
    if anatomy.head is None:
        raise InputError(f"a knockout needs a language model; this {anatomy.family} model has no head")
    if len(windows.ids) < 2 and by == "interchange":
        raise InputError("an interchange needs at least two windows of text")
    device = next(model.parameters()).device
    parts = _parts(windows.ids.to(device))
    found = {a: torch.zeros(inner.count, dtype=torch.float64) for a, inner in units.items()}
    for number, ids in enumerate(parts):
        with observing(model):
            plain = _predicted(model, ids)
            for address, inner in units.items():
                for unit in range(inner.count):
                    with hooked_before(_replacing(model, inner, unit, by)):
                        other = _predicted(model, ids)
                    found[address][unit] += float((plain.exp() * (plain - other)).sum(dtype=torch.float64))
        if progress is not None:
            progress("knockout", number + 1, len(parts))
    return {address: total / windows.ids.numel() for address, total in found.items()}


def _parts(ids: Tensor) -> list[Tensor]:
    """A few windows at a time, never one alone where there are more."""
    rows = max(2, TOKENS_AT_ONCE // ids.shape[1])
    parts = list(torch.split(ids, rows))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def _replacing(model: nn.Module, inner: Inner, unit: int, by: By) -> list[tuple[nn.Module, Callable[..., Any]]]:
    hooks = []
    for piece in (s for s in inner.slices if s.writes):
        channels = slice(piece.start + unit * piece.width, piece.start + (unit + 1) * piece.width)

        def replaced(module: nn.Module, args: Any, channels: slice = channels) -> Any:
            x = args[0].clone()
            x[..., channels] = 0 if by == "zero" else args[0][..., channels].roll(1, 0)
            return (x, *args[1:])

        hooks.append((model.get_submodule(piece.parameter.removesuffix(".weight")), replaced))
    return hooks


def _predicted(model: Any, ids: Tensor) -> Tensor:
    return torch.log_softmax(model(input_ids=ids, use_cache=False).logits.float(), -1)
