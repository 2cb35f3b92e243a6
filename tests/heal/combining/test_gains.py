"""Gains: what is folded is what was fitted, only what helps is taken, and every family says where it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import VOCABULARY, build
from torch.nn.functional import cross_entropy

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.export.huggingface import save
from billhook.heal import branch_gains, healed
from billhook.heal.combining.gains import gains_of, require_gains
from billhook.measure.gates import Gates
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.schedule import Schedule
from billhook.surgery import apply
from billhook.surgery.reopen import load

IDS = torch.randint(3, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(4)).repeat(3, 1)
TEXT = Windows.of(IDS, "the same three times")
DROPS = [Address("decoder", 1), Address("decoder", 2, "mlp")]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt_post_norm", "deepseek_v3", "falcon", "bloom"])
def test_the_folded_model_is_the_one_with_gains(name: str) -> None:
    model = build(name)
    anatomy = discover(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    healing, fitted = gains_of(model, anatomy, DROPS, TEXT, steps=6, rate=0.05)
    assert healing.tensors, "text that repeats is learned"
    cut = apply(model, anatomy, DROPS)
    gates = Gates(cut, discover(cut), TEXT, list(fitted))
    with healed(model, healing):
        folded = apply(model, anatomy, DROPS)
    logits = folded(input_ids=IDS[:1]).logits[0, :-1].float()
    assert cross_entropy(logits, IDS[0, 1:]).item() == pytest.approx(gates.loss(fitted, 0), abs=1e-4)
    assert gates.loss(fitted, 0) < gates.loss({}, 0)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_what_does_not_help_on_held_back_text_is_not_taken() -> None:
    """Learned on one text, far beyond what is good, and judged on another."""
    model = build("llama")
    other = torch.randint(3, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(5))
    healing, fitted = gains_of(model, discover(model), DROPS, Windows.of(torch.cat([IDS[:2], other]), "two"), rate=1.0)
    assert not healing.tensors
    assert set(fitted.values()) == {1.0}


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_where_norms_stand_behind_the_writes_it_is_refused(name: str) -> None:
    model = build(name)
    with pytest.raises(InputError, match="norms stand behind"):
        gains_of(model, discover(model), DROPS, TEXT)


def test_one_window_is_not_enough() -> None:
    model = build("llama")
    with pytest.raises(InputError, match="two windows"):
        gains_of(model, discover(model), DROPS, Windows.of(IDS[:1], "one"))


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3_moe"])
def test_never_further_from_dense_on_what_is_held_back_and_saved_as_proven(name: str, tmp_path: Path) -> None:
    model = build(name)
    anatomy = discover(model)
    plan = Plan.of([Address("decoder", 1)])
    found = branch_gains(model, anatomy, plan, TEXT)
    assert found.cut is not None and found.healed is not None
    assert found.refused == (found.healed >= found.cut) == (not found.tensors)
    with healed(model, found):
        small = apply(model, anatomy, plan)
    save(small, anatomy, plan, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path).model(IDS).logits, small(IDS).logits)


def test_plans_and_families_that_have_no_gains() -> None:
    with pytest.raises(InputError, match="norms stand behind"):
        require_gains(discover(build("gemma2")))
    model = build("llama")
    plan = Plan(schedule=Schedule.chain([0, 1, 1, 3, 4]))
    with pytest.raises(InputError, match="share weights"):
        branch_gains(model, discover(model), plan, TEXT)
