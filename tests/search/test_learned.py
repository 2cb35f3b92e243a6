"""Searches by gradients and by reward, on losses whose best answer is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import problem

from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.search import Found, Problem, bandit, gates, sampled
from billhook.search.gates import projected
from billhook.search.relaxed import cheapest, shares


class Bowl:
    """1 + sum of weight x share x (1 - gate)^2 / 2, and for each pair of units as much as both are shut."""

    def __init__(
        self, problem: Problem, cheap: set[Address], pairs: Mapping[tuple[Address, Address], float] | None = None
    ) -> None:
        self.weight = {u: s * (1.0 if u in cheap else 8.0) for u, s in shares(problem).items()}
        self.pairs = dict(pairs or {})
        self.work = 0
        self.texts: list[int] = []

    def loss(self, gates: Mapping[Address, float], text: int) -> float:
        self.work += 1
        shut = {u: 1 - gates.get(u, 1.0) for u in self.weight}
        near = sum(cost * shut[a] * shut[b] for (a, b), cost in self.pairs.items())
        return 1 + sum(w * shut[u] ** 2 / 2 for u, w in self.weight.items()) + near

    def slopes(self, gates: Mapping[Address, float], text: int) -> tuple[float, dict[Address, float]]:
        self.work += 1
        self.texts.append(text)
        shut = {u: 1 - gates.get(u, 1.0) for u in self.weight}
        slopes = {u: -w * shut[u] for u, w in self.weight.items()}
        for (a, b), cost in self.pairs.items():
            slopes[a] -= cost * shut[b]
            slopes[b] -= cost * shut[a]
        return self.loss(gates, text), slopes


BLOCKS = [Address("decoder", i) for i in range(8)]
EASY = {BLOCKS[i] for i in (2, 4, 6)}


def found_by(word: str, posed: Problem, bowl: Bowl, seed: int = 0) -> tuple[Found, dict[Address, float]]:
    choices: dict[str, Any] = {
        "gates": lambda: gates(posed, bowl, steps=30),
        "sampled": lambda: sampled(posed, bowl, steps=60, rate=0.4, seed=seed),
        "bandit": lambda: bandit(posed, bowl, rounds=60, draws=3, rate=3.0, seed=seed),
    }
    found: tuple[Found, dict[Address, float]] = choices[word]()
    return found


@pytest.mark.parametrize("word", ["gates", "sampled", "bandit"])
def test_the_cheap_units_are_found(word: str) -> None:
    posed = problem(8, "params=0.65", "block")
    bowl = Bowl(posed, EASY)
    found, worth = found_by(word, posed, bowl)
    assert found.drops == EASY
    assert max(worth[u] for u in EASY) < min(worth[u] for u in BLOCKS if u not in EASY)
    assert found.work == bowl.work
    assert bowl.texts == list(range(30 if word == "gates" else 60)), "a text after the other"


@pytest.mark.parametrize("word", ["gates", "sampled", "bandit"])
def test_two_units_that_need_one_another_do_not_both_go(word: str) -> None:
    posed = problem(8, "params=0.65", "block")
    one, other, next_, last = (BLOCKS[i] for i in (1, 3, 5, 7))
    found, _ = found_by(word, posed, Bowl(posed, {one, other, next_, last}, {(one, other): 4.0}))
    assert {next_, last} < found.drops and len(found.drops & {one, other}) == 1


@pytest.mark.parametrize("word", ["sampled", "bandit"])
def test_the_same_seed_learns_the_same(word: str) -> None:
    posed = problem(4, "params=0.7")
    once, again, other = (found_by(word, posed, Bowl(posed, set(posed.candidates[::3])), seed) for seed in (1, 1, 2))
    assert once == again
    assert once[1] != other[1]


def test_gates_go_by_what_a_share_of_the_budget_costs() -> None:
    """MLPs are dear by the unit and cheap for what they hold, so they go."""
    posed = problem(6, "params=0.7")
    bowl = Bowl(posed, set())
    held = shares(posed)
    mlps = {u for u in posed.candidates if u.sublayer == "mlp"}
    bowl.weight = {u: s * (1.0 if u in mlps else 1.6) for u, s in held.items()}
    assert min(bowl.weight[u] for u in mlps) > max(bowl.weight[u] for u in held if u not in mlps)
    found, _ = found_by("gates", posed, bowl)
    assert found.drops and found.drops <= mlps


def test_gates_end_open_or_shut() -> None:
    posed = problem(8, "params=0.65", "block")
    _, opened = found_by("gates", posed, Bowl(posed, EASY))
    assert all(gate < 0.1 or gate > 0.9 for gate in opened.values())


units = st.lists(st.tuples(st.floats(-2, 2), st.floats(0.01, 1)), min_size=1, max_size=12)


@given(units, st.floats(0, 1))
def test_the_projection_meets_the_budget_and_keeps_the_order(rows: list[tuple[float, float]], part: float) -> None:
    gates_ = {Address("decoder", i): row[0] for i, row in enumerate(rows)}
    share = {Address("decoder", i): row[1] for i, row in enumerate(rows)}
    far = part * sum(share.values())
    moved = projected(gates_, share, far)
    assert sum(share[u] * (1 - g) for u, g in moved.items()) == pytest.approx(far, abs=1e-6)
    assert all(0 <= g <= 1 for g in moved.values())
    order = sorted(gates_, key=lambda u: gates_[u])
    assert [moved[u] for u in order] == sorted(moved.values())


def test_part_of_the_way_and_all_of_it() -> None:
    posed = problem(8, "params=0.65", "block")
    price = {unit: float(-unit.block) for unit in BLOCKS}
    assert cheapest(posed, price, 0.3).drops == {BLOCKS[7]}
    assert cheapest(posed, price).drops == set(BLOCKS[5:])
    with pytest.raises(InputError, match="cannot be met with the 2 units"):
        cheapest(posed, dict.fromkeys(BLOCKS[:2], 0.0))
