from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from billhook.data import Windows
from billhook.heal.held import held_back, held_windows, parted
from billhook.plan.errors import InputError


@given(st.lists(st.integers(1, 9), min_size=2, max_size=9))
def test_whoever_asks_the_same_windows_are_held_back(rows: list[int]) -> None:
    windows = Windows.of(torch.arange(sum(rows))[:, None], "test")
    fitted, held = parted(windows)
    assert torch.equal(torch.cat([fitted.ids, held]), windows.ids)
    flags = held_back(rows)
    assert [len(flag) for flag in flags] == rows
    assert torch.equal(windows.ids[torch.cat(flags)], held)
    assert len(fitted.ids) >= 1 and len(held) == held_windows(len(windows.ids)) == max(1, round(len(windows.ids) / 8))


def test_one_window_cannot_be_parted() -> None:
    with pytest.raises(InputError, match="two windows"):
        parted(Windows.of(torch.zeros(1, 4, dtype=torch.long), "test"))
