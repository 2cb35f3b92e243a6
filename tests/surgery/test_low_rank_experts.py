"""The promises of surgery for experts in two parts, on every mixture: whole ones and with fewer experts."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, build
from live import assert_cache_is_exact, generate, inputs_of, logits, snapshot
from transformers import PreTrainedModel

from billhook import export
from billhook.anatomy import Anatomy, discover
from billhook.anatomy.low_rank_experts import LowRankExperts
from billhook.measure.cost import cost
from billhook.models import building
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Factorise, Keep, Plan
from billhook.surgery import apply, simulate
from billhook.surgery.reopen import load

MIXTURES = {"mixtral": (1, 2), "qwen3_moe": (0, 3, 4), "olmoe": (0, 2, 5, 7), "deepseek_v3": tuple(range(6))}


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@cache
def dense(name: str) -> tuple[PreTrainedModel, Anatomy]:
    model = build(name)
    return model, discover(model)


def plan_of(name: str, anatomy: Anatomy) -> Plan:
    """Every mixture at another rank, but for the last one; fewer experts in every other one, a dropped attention."""
    places = [(a, path) for a, s in anatomy.outline.sublayers() for path in s.mixtures]
    outlines = dict(anatomy.outline.sublayers())
    edits = [
        Factorise(unit=a, linear=path, rank=max(outlines[a].mixtures[path].useful - number, 1))
        for number, (a, path) in enumerate(places[:-1])
    ]
    keeps = [Keep(unit=a, inner="expert", indices=MIXTURES[name]) for a, _ in places[::2] if name != "deepseek_v3"]
    plan = Plan.of([Address("decoder", 1, "attention")], "remote", keeps)
    return plan.model_copy(update={"edits": (*plan.edits, *edits)})


@pytest.mark.parametrize("name", MIXTURES)
def test_simulated_applied_saved_and_reopened_agree(name: str, tmp_path: Path) -> None:
    model, anatomy = dense(name)
    plan = plan_of(name, anatomy)
    before = snapshot(model)
    applied = apply(model, anatomy, plan)
    assert sum(isinstance(part, LowRankExperts) for part in applied.modules()) == len(plan.factors) > 1
    with simulate(model, anatomy, plan) as simulated:
        for batch, padding in inputs_of(name):
            expected = logits(name, simulated, batch, padding)
            assert torch.isfinite(expected).all()
            assert torch.equal(logits(name, applied, batch, padding), expected)
        assert all(map(torch.equal, generate(name, applied, use_cache=True), assert_cache_is_exact(name, simulated)))
    assert snapshot(model) == before
    gone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in applied.parameters())
    predicted = cost(anatomy.outline, plan.drops, plan.keeps, factors=plan.factors)
    assert gone == cost(anatomy.outline)["params"] - predicted["params"]
    redrawn = cost(discover(applied).outline)
    assert redrawn["flops"] == pytest.approx(predicted["flops"]) and redrawn["flops"] < cost(anatomy.outline)["flops"]
    assert redrawn["size"] == pytest.approx(predicted["size"])

    with building(tmp_path / "out") as folder:
        export.save(applied, anatomy, plan, folder)
    auto = sorted(json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"])
    stock, info = getattr(transformers, auto[0]).from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for again in (load(tmp_path / "out").model, stock.eval()):
        for batch, padding in inputs_of(name)[-1:]:
            torch.testing.assert_close(
                logits(name, again, batch, padding), logits(name, applied, batch, padding), atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_that_are_of_that_rank_stay_what_they_are(name: str) -> None:
    """The first neurons free, the others of low rank: taken apart, they compute the same."""
    model = build(name)
    anatomy = discover(model)
    (unit, path, outline) = next((a, p, o) for a, s in anatomy.outline.sublayers() for p, o in s.mixtures.items())
    rank, n = outline.useful, outline.neurons
    experts: Any = model.get_submodule(f"{anatomy.block(unit.parent).path}.{path}")
    gate, up = experts.gate_up_proj.chunk(2, dim=1)
    others = torch.cat([gate[:, rank:], up[:, rank:]], 1)
    u, s, v = torch.linalg.svd(others, full_matrices=False)
    others = (u[:, :, :rank] * s[:, None, :rank]) @ v[:, :rank]
    gate[:, rank:], up[:, rank:] = others.chunk(2, dim=1)
    down = experts.down_proj[:, :, rank:]
    u, s, v = torch.linalg.svd(down, full_matrices=False)
    down.copy_((u[:, :, :rank] * s[:, None, :rank]) @ v[:, :rank])
    x = FAMILIES[name].inputs(model, 3, None)
    with torch.no_grad():
        expected = model(**x).logits
        plan = Plan(target="remote", edits=(Factorise(unit=unit, linear=path, rank=rank),))
        torch.testing.assert_close(apply(model, anatomy, plan)(**x).logits, expected, atol=1e-4, rtol=1e-4)
        less = Plan(target="remote", edits=(Factorise(unit=unit, linear=path, rank=rank // 2),))
        assert not torch.allclose(apply(model, anatomy, less)(**x).logits, expected, atol=1e-2)
    assert rank <= n // 2 and outline.saved_each(rank) > 0 and (rank == n // 2 or outline.saved_each(rank + 1) <= 0)


def test_what_is_refused(tmp_path: Path) -> None:
    model, anatomy = dense("mixtral")
    unit = Address("decoder", 1, "mlp")
    (path,) = dict(anatomy.outline.sublayers())[unit].mixtures

    def plan(rank: int, target: str = "remote") -> Plan:
        return Plan(target=target, edits=(Factorise(unit=unit, linear=path, rank=rank),))

    with pytest.raises(InputError, match="saves nothing"):
        apply(model, anatomy, plan(40))
    with pytest.raises(InputError, match="cannot carry"):
        apply(model, anatomy, plan(2, "uniform"))
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(InputError, match="on a loaded model"):
        export.save_checkpoint(tmp_path / "source", plan(2), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    small = apply(model, anatomy, plan(2))
    again = discover(small)
    assert "two parts already" in again.rigid[unit] and not dict(again.outline.sublayers())[unit].mixtures
