"""Shares of a loss by importance."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billhook.plan.address import Address
from billhook.search.shares import sigmoid_shares


def by_number(values: list[float]) -> dict[Address, float]:
    return {Address("decoder", i, "mlp"): v for i, v in enumerate(values)}


def test_the_formula() -> None:
    shares = sigmoid_shares(by_number([0.1, 0.2, 0.3]), 0.3, 2.0)
    kept = [1 / (1 + math.exp(-2 * d)) for d in (-0.1, 0.0, 0.1)]
    expected = [1 - k / (sum(kept) / 3) * 0.7 for k in kept]
    assert list(shares.values()) == pytest.approx(expected)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.01, 0.9), st.floats(0, 60))
def test_the_mean_is_kept_and_no_share_leaves_its_range(values: list[float], share: float, steepness: float) -> None:
    """More important blocks lose less; the mean is what was asked for; nobody keeps more than there is."""
    shares = list(sigmoid_shares(by_number(values), share, steepness).values())
    assert math.fsum(shares) / len(shares) == pytest.approx(share, abs=1e-9)
    assert all(-1e-9 <= s <= 1 + 1e-9 for s in shares)
    assert all(
        a >= b - 1e-12
        for (u, a) in zip(values, shares, strict=True)
        for v, b in zip(values, shares, strict=True)
        if u <= v
    )
