"""Ranks in an order that is learned: on every decoder, against the start, and again."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCABULARY, build

from billhook.anatomy import Anatomy, discover
from billhook.heal import Healing, healed
from billhook.measure.batches import batches_of
from billhook.measure.spectrum import Spectrum
from billhook.plan.errors import InputError
from billhook.plan.plan import Factorise, Plan
from billhook.recipes.ranks import _healing
from billhook.search.bases import Linear, bases
from billhook.search.nested import Factors, nested
from billhook.surgery import simulate

IDS = torch.randint(3, VOCABULARY - 8, (4, 10), generator=torch.Generator().manual_seed(2))
DECODERS = [
    n
    for n, family in FAMILIES.items()
    if family.generates and "decoder" in family.stacks and family.inputs.__name__ == "tokens"
]


def batches(model: Any) -> list[dict[str, Any]]:
    return list(batches_of([{"input_ids": ids[None]} for ids in IDS], model))


def plan_of(learned: dict[Linear, Factors], ranks: dict[Linear, int]) -> Plan:
    return Plan(target="remote").factorised(
        {
            Factorise(unit=unit, linear=path, rank=rank): learned[unit, path].basis(rank).numpy()
            for (unit, path), rank in ranks.items()
        }
    )


def half(anatomy: Anatomy, starts: dict[Linear, Spectrum]) -> dict[Linear, int]:
    return {linear: max(len(start.energies) // 2, 1) for linear, start in starts.items()}


@torch.no_grad()
def off(model: Any, anatomy: Anatomy, plan: Plan, healing: Healing) -> float:
    log_p = model(IDS).logits.log_softmax(-1)
    with healed(model, healing), simulate(model, anatomy, plan):
        log_q = model(IDS).logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.mark.parametrize("name", DECODERS)
def test_the_first_ranks_are_those_that_were_trained(name: str) -> None:
    """The plan with the new weights is the model that was trained, cut off at these ranks; the old one is untouched."""
    model = build(name)
    anatomy = discover(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    starts = bases(model, anatomy, batches(model), "moments")
    ranks = half(anatomy, starts)
    learned = nested(model, anatomy, starts, ranks, batches(model), steps=4, seed=0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert learned.keys() == ranks.keys()
    assert not any(parameter.grad is not None for parameter in model.parameters())
    for linear, rank in list(ranks.items())[:3]:
        factors = learned[linear]
        assert not torch.equal(factors.expand, starts[linear].basis)
        u, w = factors.basis(rank), factors.weight(rank)
        torch.testing.assert_close(u @ (u.T @ w), w, atol=1e-5, rtol=1e-4)
        assert factors.energies.shape == starts[linear].energies.shape and (factors.energies >= 0).all()
    opened: Any = type("Opened", (), {"model": model, "anatomy": anatomy})
    windows: Any = type("Windows", (), {"tokens": IDS.numel()})
    found = _healing(opened, learned, ranks, windows)
    x = FAMILIES[name].inputs(model, 3, "left" if FAMILIES[name].pads else None)
    with torch.no_grad(), healed(model, found):
        expected = model(**x).logits
        with simulate(model, anatomy, plan_of(learned, ranks)):
            torch.testing.assert_close(model(**x).logits, expected, atol=2e-3, rtol=2e-3)


@cache
def llama() -> tuple[Any, Anatomy, dict[Linear, Spectrum]]:
    model = build("llama")
    anatomy = discover(model)
    return model, anatomy, bases(model, anatomy, batches(model), "moments")


def test_training_brings_what_matters_to_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    """The directions begin in reverse; cut off in the middle, more is left than without the training."""
    model, anatomy, found = llama()
    starts = {
        linear: Spectrum(s.energies.flip(0), s.total, s.basis.flip(1))
        for linear, s in found.items()
        if linear[1].endswith(("up_proj", "down_proj"))
    }
    ranks = half(anatomy, starts)
    opened: Any = type("Opened", (), {"model": model, "anatomy": anatomy})
    windows: Any = type("Windows", (), {"tokens": IDS.numel()})
    monkeypatch.setattr("billhook.search.nested.RATE", 3e-3)
    after = []
    for steps in (1, 80):
        learned = nested(model, anatomy, starts, ranks, batches(model), steps=steps, seed=0)
        after.append(off(model, anatomy, plan_of(learned, ranks), _healing(opened, learned, ranks, windows)))
    assert after[1] < 0.9 * after[0], after


def test_the_same_seed_the_same_ranks_and_energies_as_measured() -> None:
    model, anatomy, starts = llama()
    few = dict(list(half(anatomy, starts).items())[:2])
    one, again, other = (nested(model, anatomy, starts, few, batches(model), steps=4, seed=s) for s in (1, 1, 2))
    for linear in few:
        assert torch.equal(one[linear].expand, again[linear].expand)
        assert not torch.equal(one[linear].expand, other[linear].expand)
        whole = nested(
            model, anatomy, starts, {linear: 2 * len(starts[linear].energies)}, batches(model), steps=4, seed=0
        )
        mean = starts[linear].energies.double() / IDS.numel()
        torch.testing.assert_close(whole[linear].energies, mean, atol=1e-3, rtol=0.2)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = build("llama")
    anatomy = discover(model)
    starts = bases(model, anatomy, batches(model), "none")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(InputError, match="not finite"):
        nested(model, anatomy, starts, half(anatomy, starts), batches(model), steps=4, seed=0)
