"""The judge of a healing: the divergence it measures is the model's own, and a healing that harms is refused."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from torch.nn.functional import kl_div

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.heal import closed_form
from billhook.heal.refit.divergence import divergence
from billhook.heal.refit.places import places
from billhook.heal.refit.stepping import Stepper
from billhook.heal.refit.walk import Walk
from billhook.measure.batches import batches_of
from billhook.plan.address import Address
from billhook.surgery import simulate

SPEAKING = ["llama", "gpt2", "gemma2", "mixtral", "falcon", "bloom"]


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def walked(name: str, padding: Any) -> tuple[Any, Any, Stepper]:
    model = build(name)
    anatomy = discover(model)
    stack = anatomy.stacks[-1]
    stepper = Stepper(model, stack, list(batches_of([FAMILIES[name].inputs(model, 3, padding)], model)))
    stream = stepper.enter(0)
    for place in places(stack):
        stream = stepper.run(0, place, stream, place.silent(frozenset()))
    return model, anatomy, stepper


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", SPEAKING)
def test_of_a_language_model_it_is_that_of_its_logits(name: str, padding: Any) -> None:
    model, anatomy, stepper = walked(name, padding)
    drops = [Address(stepper.stack.name, 1)]
    chosen = torch.tensor([False, True, True])
    found = divergence(stepper, anatomy, [chosen], [nullcontext(), simulate(model, anatomy, drops)])
    inputs = stepper.batches[0]
    dense = model(**inputs).logits.log_softmax(-1)
    with simulate(model, anatomy, drops):
        cut = model(**inputs).logits.log_softmax(-1)
    real = stepper.real(0, dense) & chosen[:, None]
    expected = kl_div(cut[real], dense[real], log_target=True, reduction="sum") / real.sum()
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert found[1] == pytest.approx(expected.item(), rel=1e-3)
    assert expected > 0.01


def test_of_an_encoder_it_is_that_of_its_stream() -> None:
    model, anatomy, stepper = walked("bert", None)
    drops = [Address("encoder", 1)]
    (found,) = divergence(stepper, anatomy, [torch.ones(3, dtype=torch.bool)], [simulate(model, anatomy, drops)])
    dense = stepper.last(0)
    with simulate(model, anatomy, drops):
        cut = stepper.last(0)
    expected = ((cut - dense).square().sum(-1) / dense.square().sum(-1)).mean()
    assert found == pytest.approx(expected.item(), rel=1e-4)


def test_a_healing_that_harms_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    anatomy = discover(model)
    ids = torch.randint(3, 90, (12, 12), generator=torch.Generator().manual_seed(5))
    drops = [Address("decoder", 1)]
    kept = closed_form(model, anatomy, drops, Windows.of(ids, "test"))
    assert kept.cut is not None and kept.healed is not None
    assert bool(kept.tensors) == (kept.healed < kept.cut) == (not kept.refused)
    monkeypatch.setattr(Walk, "_scales", _upside_down(Walk._scales))
    harmed = closed_form(model, anatomy, drops, Windows.of(ids, "test"))
    assert harmed.refused and not harmed.tensors and harmed.taken == 0
    assert harmed.refits and harmed.healed >= harmed.cut


def _upside_down(scales: Any) -> Any:
    def wrong(self: Any, place: Any, stream: Any) -> Any:
        return [(write, -0.05 * scale) for write, scale in scales(self, place, stream)]

    return wrong
