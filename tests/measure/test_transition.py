"""One change point on series with and without one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from billhook.measure.transition import transition


def series(
    blocks: int, seed: int, step: float = 0.0, at: int = 0, slope: float = 0.0
) -> tuple[list[float], list[float]]:
    """Noise of deviation 0.1, plus a step and a slope over the whole depth, in the logarithm of the size too."""
    random = np.random.default_rng(seed)
    size, alignment = (
        random.normal(0, 0.1, blocks) + step * (np.arange(blocks) >= at) + slope * np.linspace(0, 1, blocks)
        for _ in range(2)
    )
    return list(np.exp(size)), list(alignment)


@given(seed=st.integers(0, 99), at=st.integers(8, 22), sign=st.sampled_from([-1, 1]))
def test_a_step_is_found_where_it_is(seed: int, at: int, sign: int) -> None:
    found = transition(*series(30, seed, step=sign * 1.0, at=at))
    assert found is not None and found.found
    assert found.block == at
    assert found.step > 0.8 > found.slope
    before, after = found.alignment
    assert after - before == pytest.approx(sign, abs=0.2)
    assert (found.size[1] > found.size[0]) == (sign > 0)


@given(seed=st.integers(0, 99))
def test_noise_and_a_steady_slope_are_none(seed: int) -> None:
    noise, slope = transition(*series(30, seed)), transition(*series(30, seed, slope=3.0))
    assert noise is not None and not noise.found and noise.step < 0.5
    assert slope is not None and not slope.found and slope.slope > slope.step


def test_the_ends_are_no_transition() -> None:
    """The first and the last block tower over the rest in nearly every model."""
    size, alignment = series(30, 0)
    size[0], size[-1] = 50.0, 20.0
    found = transition(size, alignment)
    assert found is not None and not found.found
    assert 6 <= found.block <= 24


def test_too_short_too_quiet_or_constant() -> None:
    assert transition([1.0] * 7, [0.0] * 7) is None
    assert transition([1.0] * 9 + [0.0], [0.0] * 10) is None
    assert transition([1.0] * 10, [0.3] * 10) is None
    found = transition([1.0] * 10, [0.0] * 5 + [1.0] * 5)
    assert found is not None and found.found and found.block == 5
