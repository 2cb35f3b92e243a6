"""Bases of outputs: optimal on the inputs that were measured, for every way to weigh them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from torch import Tensor

from billhook.anatomy import discover
from billhook.anatomy.low_rank import matrix
from billhook.measure.batches import batches_of
from billhook.measure.spectrum import Spectrum, spectrum
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.search.bases import bases


def lost(weight: Tensor, x: Tensor, basis: Tensor) -> float:
    y = x @ weight.T
    return (y - y @ basis @ basis.T).square().sum().item()


def drawn(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("outputs", "inputs"), [(7, 12), (12, 7)])
def test_the_energies_are_what_a_low_rank_loses_and_no_other_projection_loses_less(outputs: int, inputs: int) -> None:
    weight = drawn(outputs, inputs, 0)
    x = drawn(50, inputs, 1) * torch.logspace(0, 2, inputs, dtype=torch.float64)
    found = spectrum(weight, x.T @ x, 5)
    assert found.total == pytest.approx((x @ weight.T).square().sum().item())
    for rank in (1, 3, 5):
        basis = found.basis[:, :rank].double()
        torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=torch.float64), atol=1e-6, rtol=0)
        best = lost(weight, x, basis)
        assert best == pytest.approx(found.total - found.energies[:rank].sum().item(), rel=1e-5)
        plain = spectrum(weight, None, 5).basis[:, :rank].double()
        assert best < 0.999 * lost(weight, x, plain)
        for seed in range(5):
            other = torch.linalg.qr(basis + 0.1 * drawn(outputs, rank, seed))[0]
            assert best < lost(weight, x, other)


def test_it_is_the_whitened_decomposition_of_svd_llm() -> None:
    weight, x = drawn(6, 8, 2), drawn(40, 8, 3) * torch.arange(1, 9)
    root = torch.linalg.cholesky(x.T @ x)
    u, s, v = torch.linalg.svd(weight @ root, full_matrices=False)
    published = (u[:, :3] * s[:3]) @ v[:3] @ torch.linalg.inv(root)
    basis = spectrum(weight, x.T @ x, 3).basis.double()
    torch.testing.assert_close(basis @ basis.T @ weight, published, atol=1e-5, rtol=1e-5)


def test_channels_are_weighed_by_the_root_of_their_size_and_none_is_the_plain_decomposition() -> None:
    weight, size = drawn(6, 8, 4), torch.arange(1.0, 9.0)
    for scale, moments in ((size.sqrt().double(), size), (torch.ones(8).double(), None)):
        u, s, v = torch.linalg.svd(weight * scale, full_matrices=False)
        published = (u[:, :2] * s[:2]) @ v[:2] / scale
        basis = spectrum(weight, moments, 2).basis.double()
        torch.testing.assert_close(basis @ basis.T @ weight, published, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3", "opt_post_norm", "gemma4"])
def test_on_a_model_it_sees_what_each_linear_is_given_padding_aside(name: str) -> None:
    model: Any = build(name)
    anatomy = discover(model)
    inputs = FAMILIES[name].inputs(model, 3, "right")
    given: dict[tuple[Address, str], Tensor] = {}
    handles = []
    for address, sublayer in anatomy.outline.sublayers():
        for path in sublayer.linears:
            module = model.get_submodule(f"{anatomy.block(address.parent).path}.{path}")
            keep = partial(lambda key, module, args: given.__setitem__(key, args[0]), (address, path))
            handles.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(**next(batches_of([inputs], model)))
    for handle in handles:
        handle.remove()
    real = inputs["attention_mask"].bool()
    found = bases(model, anatomy, [inputs], "moments")
    assert found.keys() == given.keys()
    for (address, path), x in given.items():
        weight = matrix(model.get_submodule(f"{anatomy.block(address.parent).path}.{path}")).double()
        rows = x.reshape(*real.shape, -1)[real].double()
        got: Spectrum = found[address, path]
        assert got.total == pytest.approx((rows @ weight.T).square().sum().item(), rel=1e-4)
        kept = got.energies.sum().item()
        assert got.total - kept == pytest.approx(lost(weight, rows, got.basis.double()), rel=1e-3, abs=1e-4 * got.total)


def test_experts_have_no_linears_and_damage_is_refused() -> None:
    model: Any = build("mixtral")
    inputs = FAMILIES["mixtral"].inputs(model, 1, None)
    found = bases(model, discover(model), [inputs], "channels")
    assert {address.sublayer for address, _ in found} == {"attention"}
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        bases(model, discover(model), [inputs], "none")
