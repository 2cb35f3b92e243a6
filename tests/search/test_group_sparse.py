"""Inner units that are driven to zero while the rest trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import VOCABULARY, build

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.heal import Healing, healed
from billhook.measure.cost import CostModel
from billhook.measure.width import units_of
from billhook.plan.budget import Budget
from billhook.plan.plan import Plan
from billhook.search import group_sparse as module
from billhook.search.exchanged import Exchanged
from billhook.search.group_sparse import GroupSparse, group_sparse, names_of
from billhook.search.width import WidthProblem, pose_width
from billhook.surgery import apply

WINDOWS = Windows.of(torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(2)), "noise")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def _posed(name: str, unit: str = "width", budget: str = "params=0.8") -> tuple[Any, Any, WidthProblem, Any, Exchanged]:
    model = build(name)
    anatomy = discover(model)
    problem = pose_width(anatomy.outline, Budget.parse(budget), unit, stack="decoder")
    units = units_of(anatomy, unit, [space.address for space in problem.spaces])
    names = names_of(units, dict(model.named_parameters()))
    return model, anatomy, problem, units, Exchanged(model, anatomy, "decoder", names, WINDOWS, "kl")


def _found(name: str, unit: str = "width", steps: int = 6, cycles: int = 2) -> tuple[Any, Any, Exchanged, GroupSparse]:
    model, anatomy, problem, units, held = _posed(name, unit)
    return model, anatomy, held, group_sparse(held, problem, units, steps=steps, cycles=cycles)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gpt_neox", "falcon_new", "qwen2"])
def test_the_model_that_was_looked_at_is_the_narrowed_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros in what has gone are as good as the cut, before the training and after."""
    monkeypatch.setattr(module, "RATE", 1e-3)
    model, anatomy, held, found = _found(name)
    plan = Plan.of([], keeps=found.keeps)
    costs = CostModel(anatomy.outline).of((), found.keeps)
    assert costs["params"] <= 0.8 * CostModel(anatomy.outline).dense["params"]
    assert costs == pytest.approx(found.costs)

    def divergence(weights: dict[str, torch.Tensor]) -> float:
        with healed(model, Healing(weights, (), {}, 0, 0)):
            cut: Any = apply(model, anatomy, plan)
        log_p, log_q = (m(input_ids=held.held).logits[:, :-1].float().log_softmax(-1) for m in (model, cut))
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

    assert found.looks[0].held == pytest.approx(divergence({}), rel=1e-3)
    best = min(look.held for look in found.looks)
    assert divergence(found.weights) == pytest.approx(best, rel=1e-3)
    assert bool(found.weights) == (best < found.looks[0].held)


def test_the_same_again_and_the_model_as_it_was() -> None:
    model, _, _, found = _found("llama")
    fresh = build("llama")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), fresh.parameters(), strict=True))
    again = _found("llama")[3]
    assert again.keeps == found.keeps and again.looks == found.looks and again.cycles == found.cycles
    assert all(torch.equal(found.weights[name], again.weights[name]) for name in found.weights)


def test_training_makes_good_some_of_what_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RATE", 3e-3)
    _, _, problem, units, held = _posed("llama", "neuron")
    held.fit = held.held = held.fit[:1]
    found = group_sparse(held, problem, units, steps=24, cycles=1)
    assert min(look.held for look in found.looks) < 0.8 * found.looks[0].held
    assert all(look.step == 0 or look.step >= 12 for look in found.looks), "nothing is looked at that is not yet cut"


def test_units_that_do_nothing_go() -> None:
    """Neurons that are all but zero: their magnitude and all slopes times weights are the least."""
    model, _, problem, units, held = _posed("llama", "neuron", "params=0.9")
    dead = {}
    for address, inner in units.items():
        dead[address] = list(range(0, inner.count, 2))
        for piece in inner.slices:
            rows = model.get_parameter(piece.parameter).movedim(piece.axis, 0)
            rows[[piece.start + unit for unit in dead[address]]] *= 1e-3
    found = group_sparse(held, problem, units, steps=2, cycles=2)
    for keep in found.keeps:
        gone = set(range(units[keep.unit].count)) - set(keep.indices)
        assert gone <= set(dead[keep.unit])


def test_a_cycle_shrinks_its_candidates_and_puts_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, float]] = []
    step = module._Training.step

    def watched(training: Any, shrinking: Any, factor: float) -> None:
        seen.append((len(shrinking), factor))
        step(training, shrinking, factor)

    monkeypatch.setattr(module._Training, "step", watched)
    found = _found("llama", steps=4, cycles=3)[3]
    sampled, rest = seen[: 4 * found.cycles], seen[4 * found.cycles :]
    assert 1 <= found.cycles <= 3 and len(rest) == 4
    for start in range(0, len(sampled), 4):
        assert [factor for _, factor in sampled[start : start + 4]] == pytest.approx([3 / 4, 2 / 3, 1 / 2, 0])
        assert len({count for count, _ in sampled[start : start + 4]}) == 1 and sampled[start][0] > 0
    assert [factor for _, factor in rest] == pytest.approx([1 / 2, 0, 0, 0])
    assert {count for count, _ in rest} == {sum(1 for _ in module._gone(_posed("llama")[2], found.keeps))}
