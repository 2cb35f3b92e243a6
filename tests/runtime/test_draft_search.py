"""The search for what to skip, on a made-up objective."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from families import build

from billhook.anatomy import discover
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.runtime.draft_search import SkipSearch


@pytest.fixture(scope="module")
def anatomy() -> object:
    return discover(build("gemma3"))  # seven blocks


def run(search: SkipSearch, wanted: frozenset[Address]) -> list[frozenset[Address]]:
    proposed = []
    while not search.done:
        proposed.append(search.propose())
        score = 0.9 * len(proposed[-1] & wanted) / len(wanted)  # never good enough to stop early
        search.observe(score, search.matchness)
    return proposed


def test_it_proposes_what_may_go_and_keeps_the_best(anatomy: object) -> None:
    search = SkipSearch(anatomy, 0.4, trials=30)
    wanted = frozenset(search.units[1:9:2])
    proposed = run(search, wanted)
    assert len(proposed) == 30
    assert all(len(drops) == 4 and drops <= set(search.units) for drops in proposed)
    assert {a.block for a in search.units} == {1, 2, 3, 4, 5}
    best = max(len(drops & wanted) for drops in proposed)
    assert len(search.best & wanted) == best and search.matchness == 0.9 * best / 4


def test_it_does_better_than_chance(anatomy: object) -> None:
    """Over eight hidden sets: what it has after 24 candidates, against 24 random draws."""
    found, random = [], []
    for seed in range(8):
        search = SkipSearch(anatomy, 0.4, trials=24, target=1.0, seed=seed)
        wanted = frozenset(search._random.sample(search.units, 4))
        draws = [frozenset(search._random.sample(search.units, 4)) for _ in range(24)]
        run(search, wanted)
        found.append(search.matchness)
        random.append(max(0.9 * len(draw & wanted) / 4 for draw in draws))
    assert statistics.mean(found) > statistics.mean(random)


def test_the_process_prefers_neighbours_of_what_was_good(anatomy: object) -> None:
    search = SkipSearch(anatomy, 0.4)
    vectors = [search._drawn() for _ in range(12)]
    good = vectors[0]
    for bits in vectors:
        search._proposed = bits
        search.observe(1.0 - (bits != good).sum() / 8, search.matchness)
    near, far = good.copy(), ~good
    near[[int(good.argmax()), int((~good).argmax())]] = [False, True]
    expected = search._expected_improvement(np.stack([near, far]))
    assert expected[0] > expected[1]
    worst = min(vectors, key=lambda bits: -(bits != good).sum())
    assert search._expected_improvement(worst[None])[0] < 1e-3  # it is known to be far from the best


def test_same_seed_same_sets(anatomy: object) -> None:
    one, two, other = (SkipSearch(anatomy, 0.4, trials=12, seed=seed) for seed in (1, 1, 2))
    wanted = frozenset(one.units[:4])
    assert run(one, wanted) == run(two, wanted) != run(other, wanted)


@pytest.mark.parametrize("share", [0.0, 1.0, 0.01])
def test_a_share_has_to_skip_something_and_leave_something(anatomy: object, share: float) -> None:
    with pytest.raises(InputError, match="sublayers that may go"):
        SkipSearch(anatomy, share)
