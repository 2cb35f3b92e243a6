import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from billhook.evaluate.intervals import exponential, mean_interval, quartiles

samples = st.lists(st.floats(-50, 50), min_size=2, max_size=30)


@given(samples)
def test_mean_and_t_interval(values):
    interval = mean_interval(values)
    assert interval.value == pytest.approx(np.mean(values))
    if np.std(values) > 1e-6:
        low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
        assert (interval.low, interval.high) == pytest.approx((low, high))


@given(samples)
def test_limits_hold(values):
    interval = mean_interval(values, low=0.0, high=1.0)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1


def test_covers_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3.0, 1.0, size=(4000, 16))
    covered = [i.low <= 3.0 <= i.high for i in map(mean_interval, draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)  # four standard errors


def test_exponential():
    interval = exponential(mean_interval([1.0, 3.0]))
    assert interval.value == pytest.approx(math.exp(2.0))
    assert interval.low < interval.value < interval.high


def test_quartiles():
    interval = quartiles([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (interval.low, interval.value, interval.high) == (2.0, 3.0, 4.0)
