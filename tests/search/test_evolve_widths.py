"""Evolved widths keep the budget and their bounds, and find what was planted."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import build
from hypothesis import given, settings
from hypothesis import strategies as st

from billhook.anatomy import discover
from billhook.measure.cost import CostModel
from billhook.plan.address import Address
from billhook.plan.budget import Budget
from billhook.plan.errors import InputError
from billhook.plan.plan import Keep
from billhook.plan.target import Target
from billhook.search import Ledger, Memo, Stage
from billhook.search.evolve_widths import Grid, Narrowed, Widths, evolve_widths, keeps_of, mutant
from billhook.search.width import WidthProblem, allocate, pose_width

OUTLINES = {name: discover(build(name)).outline for name in ("llama", "gemma2", "phi3")}


def posed(budget: str, unit: str = "width", family: str = "llama", target: Target = Target.REMOTE) -> WidthProblem:
    return pose_width(OUTLINES[family], Budget.parse(budget), unit, target, stack="decoder")


def ranked(problem: WidthProblem) -> dict[Address, torch.Tensor]:
    return {space.address: torch.arange(space.count, dtype=torch.float64) for space in problem.spaces}


def started(problem: WidthProblem) -> Widths:
    keeps, _ = allocate(problem, ranked(problem), "uniform")
    return frozenset(Narrowed(keep.unit, len(keep.indices)) for keep in keeps)


@given(
    st.integers(0, 10_000),
    st.sampled_from(["params=0.9", "params=0.75", "flops=0.8", "params=0.85,kv_bytes=0.8"]),
    st.sampled_from(sorted(OUTLINES)),
)
@settings(max_examples=20, deadline=None)
def test_any_number_of_mutations_keeps_the_budget_and_what_may_be_left(seed: int, budget: str, family: str) -> None:
    """Counted anew from the edits; and no sublayer could have one step more."""
    problem = posed(budget, family=family)
    costs, scores, draw = CostModel(problem.outline), ranked(problem), random.Random(seed)
    grid, widths, moved = Grid.of(problem, scores), started(problem), 0
    for _ in range(8):
        after = mutant(grid, widths, draw)
        if after is None:
            continue
        widths, moved = after, moved + 1
        left = {narrowed.address: narrowed.left for narrowed in widths}
        keeps = keeps_of(problem, scores, widths)
        assert {keep.unit: len(keep.indices) for keep in keeps} == left
        assert problem.met(costs.of((), keeps))
        for space in problem.spaces:
            if space.address in left:
                assert left[space.address] in space.left[1:]
                wider = space.left[space.left.index(left[space.address]) - 1]
                others = widths - {Narrowed(space.address, left[space.address])}
                more = others | ({Narrowed(space.address, wider)} if wider < space.count else set())
                assert not problem.met(costs.of((), keeps_of(problem, scores, more)))
    assert moved


def test_what_has_no_score_stays_and_so_do_units_that_are_unknown() -> None:
    problem = posed("params=0.9", "neuron")
    scores = ranked(problem)
    first, second = problem.spaces[0], problem.spaces[1]
    del scores[first.address]
    scores[second.address][4:] = torch.inf
    grid, widths = Grid.of(problem, scores), frozenset[Narrowed]()
    draw = random.Random(0)
    for _ in range(30):
        widths = mutant(grid, widths, draw) or widths
        left = {narrowed.address: narrowed.left for narrowed in widths}
        assert first.address not in left and left.get(second.address, second.count) >= second.count - 4
    assert widths


class Planted:
    """How far widths are from planted ones, as shares of the sublayers, squared."""

    def __init__(self, problem: WidthProblem, planted: Widths, noise: float = 0.0) -> None:
        self.counts = {space.address: space.count for space in problem.spaces}
        self.planted, self.noise, self.work, self.asked = self._shares(planted), noise, 0, 0

    def _shares(self, widths: Widths) -> dict[Address, float]:
        return {**dict.fromkeys(self.counts, 1.0), **{n.address: n.left / self.counts[n.address] for n in widths}}

    def at(self, widths: Widths) -> float:
        self.work, self.asked = self.work + 1, self.asked + 1
        shake = random.Random(str(sorted(widths))).uniform(-self.noise, self.noise)
        return sum((share - self.planted[a]) ** 2 for a, share in self._shares(widths).items()) + shake

    def move(self, widths: Widths) -> None:
        pass


def planted(problem: WidthProblem) -> Widths:
    """Far from equal shares, within the budget."""
    chances = {space.address: torch.full((space.count,), float(i)) for i, space in enumerate(problem.spaces)}
    keeps, _ = allocate(problem, chances, "global")
    return frozenset(Narrowed(keep.unit, len(keep.indices)) for keep in keeps)


def search(
    problem: WidthProblem, seed: int = 0, ledger: Callable[[str], Ledger | None] = lambda name: None
) -> tuple[tuple[Keep, ...], float, int]:
    rough, true = Planted(problem, planted(problem), noise=0.05), Planted(problem, planted(problem))
    stages = [Stage(Memo(rough, ledger("rough")), 3), Stage(Memo(true, ledger("true")), 1)]
    keeps, value = evolve_widths(
        problem,
        ranked(problem),
        stages,
        generations=40,
        offspring=12,
        patience=40,
        seed=seed,
    )
    return keeps, value, rough.asked + true.asked


@pytest.mark.parametrize("unit", ["neuron", "width"])
def test_it_comes_near_the_planted_widths_and_nearer_than_chance(unit: str) -> None:
    """Chance: the best, by the true figure, of as many widths as were looked at, each a mutation away from the last."""
    problem = posed("params=0.8", unit)
    keeps, value, asked = search(problem)
    true, grid, draw = Planted(problem, planted(problem)), Grid.of(problem, ranked(problem)), random.Random(0)
    walk = [started(problem)]
    while len(walk) < asked:
        walk.append(mutant(grid, walk[-1], draw) or walk[-1])
    assert value < 0.2 * true.at(walk[0])
    assert value < 0.5 * min(map(true.at, walk))
    found = frozenset(Narrowed(k.unit, len(k.indices)) for k in keeps)
    assert true.at(found) == value


def test_the_same_seed_repeats_and_a_ledger_resumes(tmp_path: Path) -> None:
    problem = posed("params=0.8")
    keeps, value, asked = search(problem, 1, lambda name: Ledger(tmp_path / name, {}))
    again = search(problem, 1, lambda name: Ledger(tmp_path / name, {}))
    assert (again[0], again[1]) == (keeps, value) and again[2] == 0 < asked
    search(problem, 2, lambda name: Ledger(tmp_path / f"{name} by another seed", {}))
    assert (tmp_path / "rough").read_bytes() != (tmp_path / "rough by another seed").read_bytes()


def test_equal_widths_do_not_evolve() -> None:
    problem = posed("params=0.8", "neuron", target=Target.UNIFORM)
    with pytest.raises(InputError, match="evolution makes them differ"):
        evolve_widths(problem, ranked(problem), [], generations=1, offspring=2, patience=1)
