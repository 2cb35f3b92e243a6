from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from billhook.data.sampling import drawn


def test_choices_come_as_often_as_they_should_and_impossible_ones_never() -> None:
    chances = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.3, 0.0])
    found = drawn(chances.expand(40_000, -1), torch.Generator().manual_seed(0))
    assert torch.allclose(found.bincount(minlength=6) / 40_000, chances, atol=0.01)
    assert not found.bincount(minlength=6)[chances == 0].any()


@given(st.integers(1, 2000), st.integers(0, 2**31))
def test_rows_are_their_own(choices: int, seed: int) -> None:
    """A row that leaves no choice gets it, whatever the others are."""
    certain = torch.randint(choices, (3,), generator=torch.Generator().manual_seed(seed))
    found = drawn(torch.nn.functional.one_hot(certain, choices).float() * 7, torch.Generator().manual_seed(seed))
    assert torch.equal(found, certain)


def test_the_least_number_draws_no_impossible_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.zeros(shape))
    assert drawn(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.Generator()).tolist() == [2]
