"""Weights and masks that are trained together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families import VOCABULARY, build
from torch import Tensor

from billhook.anatomy import discover
from billhook.anatomy.linears import Linear
from billhook.data import Windows
from billhook.search import sparse_training
from billhook.search.masks import chosen
from billhook.search.sparse_steps import Sparsified, learned
from billhook.search.sparse_training import DecayingFlow, LowRankScores

WINDOWS = Windows.of(torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(2)), "noise")
LINEARS = {"w": Linear("w", "w", 1)}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


RULES: list[Callable[..., Any]] = [LowRankScores, DecayingFlow]


@pytest.mark.parametrize("rule", RULES)
def test_it_begins_with_masks_by_magnitude(rule: Callable[..., Any]) -> None:
    weight = _draw(12, 8)
    state = rule(LINEARS, {"w": weight}, 0.5, (2, 4), 0).state()
    assert torch.equal(state.masks["w"], chosen(weight.abs(), 0.5, (2, 4), by_row=False))
    assert torch.equal(state.weights["w"], weight)


def test_the_share_that_goes_rises_from_none_to_all() -> None:
    rule = LowRankScores(LINEARS, {"w": _draw(20, 20)}, 0.25, None, 0)
    left = [(rule.given("w", along) != 0).float().mean().item() for along in (0.0, 0.1, 0.4, 0.7, 1.0)]
    assert left == pytest.approx([1, 1, 1 - 0.75 * (1 - 0.5**3), 0.25, 0.25], abs=0.003)


def test_what_goes_fades_in_a_straight_line() -> None:
    weight = _draw(20, 20)
    rule = DecayingFlow(LINEARS, {"w": weight}, 0.5, (2, 4), 0)
    mask = chosen(weight.abs(), 0.5, (2, 4), by_row=False)
    for along, left in ((0.0, 1.0), (0.35, 0.5), (0.7, 0.0), (1.0, 0.0)):
        given = rule.given("w", along)
        assert torch.equal(given[mask], weight[mask])
        torch.testing.assert_close(given[~mask], weight[~mask] * left, atol=1e-6, rtol=1e-5)


def test_slopes_reach_weights_that_have_gone() -> None:
    weight = _draw(4, 8)
    rule = DecayingFlow(LINEARS, {"w": weight}, 0.5, (2, 4), 0)
    rule.given("w", 1.0)
    rule.learn("w", -torch.ones(4, 8), 1.0)
    moved = rule.state().weights["w"] - weight
    assert (moved > 0).all()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.02 * weight.abs().mean().item()), atol=1e-5, rtol=1e-3)


def test_slopes_of_the_factors_are_those_of_a_mask_that_is_gone_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """By autograd, with mask + score - score.detach() for the mask."""
    seen: list[Tensor] = []
    weight, slope = _draw(6, 8), _draw(6, 8, seed=1)
    rule = LowRankScores(LINEARS, {"w": weight}, 0.5, None, 0)
    scores = rule._scores["w"]
    scores.change.v.copy_(0.1 * _draw(8, 8, seed=2))
    scores.part.v.copy_(0.1 * _draw(8, 8, seed=3))
    learn = [scores.change.u, scores.change.v, scores.part.u, scores.part.v, scores.row, scores.column]
    wanted = [tensor.clone().requires_grad_() for tensor in learn]
    given = rule.given("w", 1.0)
    with torch.enable_grad():
        u, v, a, b, row, column = wanted
        whole = weight + u @ v
        score = whole.abs() + a @ b + row + column
        mask = (given != 0).float() + score - score.detach()
        torch.testing.assert_close(given, (mask * whole).detach())
        (mask * whole * slope).sum().backward()
    monkeypatch.setattr(sparse_training.Adam, "move", lambda adam, values, slope, rate: seen.append(slope))
    rule.learn("w", slope, 1.0)
    for one, other in zip(seen, wanted, strict=True):
        torch.testing.assert_close(one, other.grad)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_training_makes_good_some_of_what_goes(rule: Callable[..., Any], name: str) -> None:
    """On the same text; and what comes of it is what was looked at, saved."""
    model = build(name)
    held = Sparsified(model, discover(model), "decoder", WINDOWS, "kl")
    held.fit = held.held = held.fit[:1]
    best, looks = learned(held, rule(held.linears, held.dense, 0.75, (3, 4), 0), steps=48, what="test")
    assert min(look.held for look in looks) < 0.8 * looks[0].held
    with held.opened():
        assert held.look(best) == min(look.held for look in looks)
    for key, mask in best.masks.items():
        assert int(mask.sum()) == round(0.75 * mask.numel()) and best.weights[key].dtype == held.dense[key].dtype
