"""Trained on keys and values of others, a model bears sharing that it never saw; outside a step nothing is shared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import build
from heal.training.training_bed import quick, require_hardened, text
from torch import nn

from billhook.anatomy import discover
from billhook.heal import UNTOUCHED
from billhook.heal.training.kv_routing import Routes
from billhook.heal.training.train import train
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.runtime.kv_lending import kinds, nearest
from billhook.runtime.kv_share import KvShare


def test_sharing_hurts_less_after_training_with_it(tmp_path: Path) -> None:
    ways = [KvShare(blocks=blocks).attach for blocks in ("1+3", "1-3")]
    require_hardened("kv-routing", "routes", 60, ways, tmp_path)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "deepseek_v3"])
def test_a_draw_shares_as_the_policy_does_and_the_gradient_goes_to_the_lender(name: str) -> None:
    model = build(name)
    anatomy = discover(model)
    routes, ids = Routes(model, anatomy), text().ids[:2]
    found = kinds(model, anatomy)
    everything = nearest(found, set(found))
    with routes.drawn(1.0, "all"), torch.no_grad():
        drawn = model(ids, use_cache=False).logits
    with KvShare(blocks="+".join(map(str, everything))).attach(model, anatomy), torch.no_grad():
        assert torch.equal(drawn, model(ids, use_cache=False).logits)
    with routes.drawn(0.0, "none"), torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
        assert all("forward" not in vars(module) for module in model.modules())
    with routes.drawn(0.5, "a"), torch.no_grad():
        one = model(ids, use_cache=False).logits
    with routes.drawn(0.5, "a"), torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, one)
    assert all("forward" not in vars(module) for module in model.modules())


def test_the_gradient_of_keys_and_values_is_the_lenders() -> None:
    model = build("llama")
    with Routes(model, discover(model)).drawn(1.0, "all"):
        model(text().ids[:2], use_cache=False).logits.sum().backward()
    projections: list[nn.Linear] = [layer.self_attn.k_proj for layer in model.model.layers]
    assert projections[0].weight.grad is not None and projections[0].weight.grad.abs().sum() > 0
    assert all(projection.weight.grad is None for projection in projections[1:])


def test_a_model_with_nothing_to_share_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    gone = Plan.of([f"decoder.{number}.attention" for number in (1, 2, 3, 4)])
    with pytest.raises(InputError, match="two blocks whose keys and values are alike"):
        train(model, discover(model), gone, UNTOUCHED, text(), quick("kv-routing"), tokens=96, state=tmp_path / "state")
