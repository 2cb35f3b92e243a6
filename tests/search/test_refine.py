import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import Synthetic, problem

from billhook.search import Found, Memo, greedy


def run(seed: int, refine: float) -> tuple[Found, float]:
    memo = Memo(Synthetic(10, seed, pairs=0.5))
    found = greedy(problem(10, "params=0.7"), memo, refine=refine)
    return found, found.steps[-1].objective or 0.0


@given(st.integers(0, 300))
@settings(max_examples=25, deadline=None)
def test_second_thoughts_never_end_higher(seed: int) -> None:
    before, after = run(seed, 0.0), run(seed, 1.0)
    assert after[1] <= before[1]
    assert after[0].steps[: len(before[0].steps)] == before[0].steps


def test_they_find_what_greedy_overlooked() -> None:
    for seed in (5, 14, 18):
        assert run(seed, 1.0)[1] < run(seed, 0.0)[1]


@pytest.mark.parametrize("allowance", [0.05, 0.2, 0.5])
def test_the_allowance_is_kept_but_for_the_exchange_under_way(allowance: float) -> None:
    for seed in range(6):
        before, after = run(seed, 0.0)[0], run(seed, allowance)[0]
        assert after.work <= before.work * (1 + allowance) + 40


def test_no_exchange_where_nothing_interacts() -> None:
    """An additive objective and units of one size: greedy is optimal."""
    posed = problem(10, "blocks=6", "block")
    memo = Memo(Synthetic(10, 4))
    assert greedy(posed, memo, refine=5.0).drops == greedy(posed, Memo(Synthetic(10, 4))).drops
