"""Refits of linears in two parts: they keep to the basis of the plan, and the model is the one that was promised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, build

from billhook.anatomy import discover
from billhook.anatomy.low_rank import matrix
from billhook.data import Windows
from billhook.export.huggingface import save
from billhook.heal import closed_form, healed
from billhook.heal.refit.low_rank import onto, projected
from billhook.plan.address import Address
from billhook.plan.plan import Factorise, Plan
from billhook.search.bases import bases
from billhook.surgery import apply, simulate
from billhook.surgery.factorise import factors_of
from billhook.surgery.reopen import load

#: Grouped queries, fused reads, Conv1D with biases, a parallel block, norms behind the writes.
ALL = ["llama", "phi3", "gpt2", "falcon", "gemma2"]


def windows(rows: int = 16, seed: int = 5) -> Windows:
    return Windows.of(torch.randint(3, 90, (rows, 12), generator=torch.Generator().manual_seed(seed)), "test")


def plan_of(name: str) -> Plan:
    model = build(name)
    anatomy = discover(model)
    gone = [] if anatomy.stacks[0].blocks[2].parallel else [Address("decoder", 2, "mlp")]
    found = bases(model, anatomy, windows(), "moments")
    edits = {
        Factorise(unit=unit, linear=path, rank=rank): spectrum.basis[:, :rank].numpy()
        for (unit, path), spectrum in found.items()
        if unit.block and unit not in gone
        for rank in [max(len(spectrum.energies) * 2 // 3, 1)]
    }
    return Plan.of(gone).factorised(edits)


@pytest.mark.parametrize("name", ALL)
def test_simulated_applied_and_reloaded_agree_and_the_second_parts_are_those_of_the_plan(
    name: str, tmp_path: Path
) -> None:
    model, plan = build(name), plan_of(name)
    anatomy = discover(model)
    healing = closed_form(model, anatomy, plan, windows())
    assert any(refit.taken for refit in healing.refits)
    assert healing.cut is not None and healing.healed is not None and healing.healed < healing.cut
    inputs = FAMILIES[name].inputs(model, 2, None)
    with torch.no_grad():
        intact = model(**inputs)[0]
        cut = apply(model, anatomy, plan)(**inputs)[0]
        with healed(model, healing):
            applied = apply(model, anatomy, plan)
            with simulate(model, anatomy, plan) as simulated:
                expected = simulated(**inputs)[0]
        assert torch.equal(applied(**inputs)[0], expected)
        assert not torch.allclose(expected, cut, atol=1e-3)
        assert torch.equal(model(**inputs)[0], intact)
        save(applied, anatomy, plan, tmp_path)
        torch.testing.assert_close(load(tmp_path).model(**inputs)[0], expected, atol=1e-5, rtol=1e-5)
    for factor in factors_of(plan, anatomy):
        name_ = f"{factor.path}.weight"
        if name_ in healing.tensors:
            linear = model.get_submodule(factor.path)
            new = healing.tensors[name_]
            new = new.T if matrix(linear).shape != new.shape or type(linear).__name__ == "Conv1D" else new
            inside = factor.basis @ factor.basis.T @ new
            torch.testing.assert_close(inside, new, atol=1e-4 * new.abs().max().item(), rtol=0)


def test_what_the_walk_runs_is_what_a_cut_makes() -> None:
    model, plan = build("gpt2"), plan_of("gpt2")
    anatomy = discover(model)
    applied = apply(model, anatomy, Plan(edits=plan.factors, arrays=plan.arrays))
    for name, tensor in projected(model, factors_of(plan, anatomy)).items():
        two = applied.get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close((two.expand.weight @ two.reduce.weight).T, tensor)


def test_onto_is_the_part_that_the_second_linear_can_write() -> None:
    drawn = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 2, generator=drawn))[0]
    scale, z = torch.rand(6, generator=drawn) + 0.5, torch.randn(3, 2, generator=drawn)
    reachable = z @ basis.T * scale
    torch.testing.assert_close(onto(basis, scale, reachable), reachable)
    other = torch.randn(3, 6, generator=drawn)
    once = onto(basis, scale, other)
    torch.testing.assert_close(onto(basis, scale, once), once)
    assert not torch.allclose(once, other)
