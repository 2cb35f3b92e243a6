"""Masks N:M that are learned, and the loop of every such training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCABULARY, build
from torch import Tensor, nn

from billhook.anatomy import discover
from billhook.anatomy.linears import Linear
from billhook.data import Windows
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.search import learned_masks
from billhook.search.learned_masks import LearnedMasks
from billhook.search.masks import chosen
from billhook.search.sparse_steps import Sparsified, State, learned
from billhook.search.sparsity import sparsify
from billhook.surgery import apply

WINDOWS = Windows.of(torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(2)), "noise")
LINEAR = {"w": Linear("w", "w", 1)}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def _rule(weight: Tensor, prior: Tensor, m: int = 4, seed: int = 0) -> LearnedMasks:
    return LearnedMasks(LINEAR, {"w": weight}, {"w": prior}, seed, m)


def _prior(*rows: str) -> Tensor:
    return torch.tensor([[digit == "1" for digit in row] for row in rows])


def test_it_begins_with_the_prior_and_keeps_the_size_of_every_group() -> None:
    prior = _prior("11001010", "10000110", "00001111")
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    rule = _rule(weight, prior)
    assert torch.equal(rule.state().masks["w"], prior) and not rule.state().weights
    for along in (0.0, 0.5, 1.0):
        given = rule.given("w", along) / weight
        torch.testing.assert_close(given.reshape(3, 2, 4).sum(-1), prior.reshape(3, 2, 4).sum(-1).float())
        assert ((given >= 0) & (given <= 1 + 1e-5)).all()
        rule.learn("w", torch.randn(3, 8, generator=torch.Generator().manual_seed(7)), along)
    mask = rule.state().masks["w"]
    assert torch.equal(mask.reshape(3, 2, 4).sum(-1), prior.reshape(3, 2, 4).sum(-1))


def test_a_choice_is_soft_at_first_and_hard_in_the_end() -> None:
    weight, prior = torch.ones(50, 8), _prior(*["11000011"] * 50)
    soft, hard = (_rule(weight, prior).given("w", along) for along in (0.0, 1.0))
    assert ((hard - hard.round()).abs() < 1e-3).float().mean() > 0.98
    assert torch.equal(hard.round().bool(), prior), "sure enough of the prior by then"
    assert ((soft - soft.round()).abs() < 1e-3).float().mean() < 0.02
    assert soft[prior].mean() > soft[~prior].mean() + 0.1
    assert torch.equal(soft, _rule(weight, prior).given("w", 0.0))
    assert not torch.equal(soft, _rule(weight, prior, seed=1).given("w", 0.0))


def test_the_slope_of_a_logit_is_that_of_the_soft_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(learned_masks.Adam, "move", lambda adam, values, slope, rate: seen.append(slope))
    weight = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    rule = _rule(weight, _prior("1100", "0110"))
    rule.given("w", 0.25)
    slope = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    rule.learn("w", slope, 0.25)

    again = _rule(weight, _prior("1100", "0110"))
    groups = again._groups["w"][0]
    noise = torch.empty_like(groups.logits).exponential_(generator=again._draw).log().neg()
    logits = groups.logits.clone().requires_grad_()
    temperature, scale = 4 - 0.25 * 3.95, 1 + 0.25 * 4
    with torch.enable_grad():
        mask = torch.softmax((scale * logits + noise) / temperature, 1) @ groups.options
        (mask * weight * slope).sum().backward()
    torch.testing.assert_close(seen[0], logits.grad)


def test_a_better_mask_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wanted is the weight without its second half; the prior has the first half go in every other group."""
    weight = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    wanted = _prior(*["11001100"] * 40)
    rule = _rule(weight, _prior(*["11000011", "00111100"] * 20))
    monkeypatch.setattr(learned_masks, "RATE", 0.3)
    for step in range(80):
        along = step / 79
        rule.learn("w", 2 * (rule.given("w", along) - weight * wanted), along)
    assert (rule.state().masks["w"] == wanted).float().mean() > 0.95


def test_too_many_masks_are_refused() -> None:
    with pytest.raises(InputError, match="pattern of 8 or less"):
        _rule(torch.ones(1, 16), torch.arange(16)[None] < 8, m=16)


class Fixed:
    """A rule that gives and comes to what it is told, step by step."""

    def __init__(self, states: list[State], dense: Mapping[str, Tensor]) -> None:
        self.states, self.dense, self.heard = states, dense, 0

    def given(self, name: str, along: float) -> Tensor:
        return self.dense[name] * 0.5

    def learn(self, name: str, slope: Tensor, along: float) -> None:
        assert slope.shape == self.dense[name].shape
        self.heard += 1

    def state(self) -> State:
        return self.states.pop(0)


def _states(held: Sparsified, *shares: float) -> list[State]:
    return [
        State({n: chosen(w.abs(), share, None, by_row=False) for n, w in held.dense.items()}, {}) for share in shares
    ]


@pytest.mark.parametrize(("shares", "best"), [((0.9, 0.3, 0.2), 0), ((0.3, 0.9, 0.2), 1), ((0.2, 0.3, 0.9), 2)])
def test_the_best_on_held_back_text_wins_the_start_included(shares: tuple[float, ...], best: int) -> None:
    model = build("llama")
    held = Sparsified(model, discover(model), "decoder", WINDOWS, "kl")
    states = _states(held, *shares)
    rule = Fixed(list(states), held.dense)
    found, looks = learned(held, rule, steps=2, what="test")
    assert found is states[best] and [look.step for look in looks] == [0, 1, 2]
    assert min(looks, key=lambda look: look.held).step == best
    assert rule.heard == 2 * len(held.dense)
    blocks, length = len(discover(model).stack("decoder").blocks), WINDOWS.ids.shape[1]
    assert held.work == blocks * length * (2 * 4 + 3 * 2 * len(held.held))


def test_the_model_is_left_as_it_was() -> None:
    model = build("llama")
    before = {name: (id(p), p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    held = Sparsified(model, discover(model), "decoder", WINDOWS, "loss")

    class Broken(Fixed):
        def learn(self, name: str, slope: Tensor, along: float) -> None:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        learned(held, Broken(_states(held, 0.5), held.dense), steps=1, what="test")
    for name, p in model.named_parameters():
        number, value, wanted = before[name]
        assert id(p) == number and torch.equal(p, value) and p.requires_grad == wanted


def test_a_loss_that_is_no_number_is_refused() -> None:
    model = build("llama")
    held = Sparsified(model, discover(model), "decoder", WINDOWS, "loss")
    broken = {name: weight * float("nan") for name, weight in held.dense.items()}
    with held.opened(), pytest.raises(InputError, match="not finite"):
        held.slopes(broken, 0)


def _speaks(name: str) -> bool:
    model = build(name)
    anatomy = discover(model)
    stacks = [stack for stack in anatomy.stacks if stack.name == "decoder"]
    return bool(stacks) and stacks[0].causal and anatomy.head is not None and not model.config.is_encoder_decoder


SPEAKERS = [name for name in FAMILIES if _speaks(name)]


@pytest.mark.parametrize("name", SPEAKERS)
def test_what_is_looked_at_is_what_is_saved_in_every_family(name: str) -> None:
    """The loss of the state is that of the applied plan, and slopes reach every linear that the text reaches."""
    model = build(name)
    anatomy = discover(model)
    shares = dict.fromkeys(range(len(anatomy.stack("decoder").blocks)), 0.5)
    found = sparsify(model, anatomy, "decoder", shares, WINDOWS, by="magnitude")
    held = Sparsified(model, anatomy, "decoder", WINDOWS, "loss")
    masks = {n: chosen(held.linears[n].rows(w).abs(), 0.5, None, by_row=False) for n, w in held.dense.items()}
    state = State({n: held.linears[n].whole(mask, held.dense[n]) for n, mask in masks.items()}, {})
    with held.opened():
        seen = held.look(state)
        _, slopes = held.slopes({n: held.sparse(state, n) for n in held.dense}, 0)
    applied: Any = apply(model, anatomy, Plan.of([], sparsities=found.edits, arrays=found.arrays))
    logits = applied(input_ids=held.held).logits[:, :-1].float()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), held.held[:, 1:].flatten())
    assert seen == pytest.approx(loss.item(), rel=1e-4)
    assert len(slopes) > 0.7 * len(held.dense)


def test_a_model_that_predicts_nothing_is_refused() -> None:
    model = build("t5") if "t5" in FAMILIES else build("bert")
    anatomy = discover(model)
    with pytest.raises(InputError, match="does not predict"):
        Sparsified(model, anatomy, anatomy.stacks[-1].name, WINDOWS, "loss")
