"""Which windows no fit may see: on them it is decided what is kept, and what is said of it is true there."""

from __future__ import annotations

import torch
from torch import Tensor

from billhook.data import Windows
from billhook.plan.errors import InputError

SHARE = 1 / 8


def held_windows(windows: int) -> int:
    """How many of so many are held back, from the end: an eighth of them, at least one. InputError for fewer than
    two."""
    if windows < 2:
        raise InputError("healing needs at least two windows: one to fit on and one to hold back")
    return max(1, round(SHARE * windows))


def parted(windows: Windows) -> tuple[Windows, Tensor]:
    """The windows to fit on, and the ids [n, length] of those held back."""
    back = held_windows(len(windows.ids))
    return Windows.of(windows.ids[:-back], windows.name), windows.ids[-back:]


def held_back(rows: list[int]) -> list[Tensor]:
    """Of windows that come in batches of so many rows, which are held back: bool [rows] a batch."""
    return from_the_end(rows, held_windows(sum(rows)))


def from_the_end(rows: list[int], count: int) -> list[Tensor]:
    """So many of all rows, from the end: bool [rows] a batch."""
    total = sum(rows)
    return list(torch.split(torch.arange(total) >= total - count, rows))
