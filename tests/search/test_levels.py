"""Widths by measured damage: dear sublayers keep their units, cheap ones give them."""

from __future__ import annotations

import pytest
import torch
from families import build

from billhook.anatomy import discover
from billhook.measure.ablation import Ablator
from billhook.plan.budget import Budget
from billhook.plan.plan import Keep, Plan
from billhook.plan.target import Target
from billhook.search.levels import levels_of, prices
from billhook.search.width import allocate, pose_width
from billhook.surgery import apply

OUTLINE = discover(build("llama")).outline
PROBLEM = pose_width(OUTLINE, Budget.parse("params=0.8"), "neuron", Target.REMOTE, stack="decoder")
SCORES = {space.address: torch.arange(space.count, dtype=torch.float64) for space in PROBLEM.spaces}


def gone(keep: Keep) -> float:
    count = next(space.count for space in PROBLEM.spaces if space.address == keep.unit)
    return 1 - len(keep.indices) / count


def test_prices_add_up_to_what_was_measured_at_every_level() -> None:
    damage = {space.address: (lambda x, a=space.address.block + 1: a * x**2) for space in PROBLEM.spaces}
    found = prices(PROBLEM, SCORES, lambda keep: damage[keep.unit](gone(keep)))
    for space in PROBLEM.spaces:
        price = found[space.address]
        assert price.shape == (space.count,) and (price >= 0).all()
        for left in levels_of(space):
            assert price[: space.count - left].sum() == pytest.approx(damage[space.address](1 - left / space.count))
        assert levels_of(space)[-1] == space.left[-1]


def test_where_narrowing_costs_more_more_is_kept() -> None:
    """Damage a x^2 in block a: the price is equal everywhere where x falls with a."""
    found = prices(PROBLEM, SCORES, lambda keep: (keep.unit.block + 1) * gone(keep) ** 2)
    keeps, costs = allocate(PROBLEM, SCORES, "measured", prices=found)
    assert PROBLEM.met(costs)
    lost = [gone(keep) for keep in sorted(keeps, key=lambda keep: keep.unit)]
    assert len(lost) == len(PROBLEM.spaces) and lost == sorted(lost, reverse=True) and lost[0] > 2 * lost[-1]
    even, _ = allocate(PROBLEM, SCORES, "measured", prices=prices(PROBLEM, SCORES, gone))
    assert sum((k.unit.block + 1) * gone(k) ** 2 for k in keeps) < sum((k.unit.block + 1) * gone(k) ** 2 for k in even)


def test_damage_that_falls_again_is_noise() -> None:
    rising = iter([0.3, 0.1] * 100)
    found = prices(PROBLEM, SCORES, lambda keep: next(rising))
    assert all((price >= 0).all() and price.sum() == pytest.approx(0.3, abs=0.01) for price in found.values())


def test_the_weakest_units_are_those_that_are_gone_when_it_is_measured() -> None:
    seen: list[Keep] = []
    prices(PROBLEM, SCORES, lambda keep: float(len(seen.append(keep) or seen)))  # type: ignore[func-returns-value]
    for keep in seen:
        count = len(SCORES[keep.unit])
        assert keep.indices == tuple(range(count - len(keep.indices), count))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "opt", "phi3"])
def test_the_figure_of_a_narrowed_model_is_that_of_one_that_is_cut(name: str) -> None:
    model = build(name)
    anatomy = discover(model)
    problem = pose_width(anatomy.outline, Budget.parse("params=0.8"), "width", Target.REMOTE, stack="decoder")
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    ablator = Ablator(model, anatomy, [{"input_ids": ids}], "kl")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for space in (problem.spaces[0], problem.spaces[-1]):
        keep = Keep(unit=space.address, inner=space.kind, indices=tuple(range(space.left[-1])))
        smaller = apply(model, anatomy, Plan.of([], Target.REMOTE, [keep]))
        with torch.no_grad():
            p, q = (m(ids).logits[:, :-1].log_softmax(-1) for m in (model, smaller))
        kl = (p.exp() * (p - q)).sum(-1).mean().item()
        assert kl > 1e-6
        assert ablator.narrowed(keep) == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert ablator.value() == pytest.approx(0, abs=1e-6)
