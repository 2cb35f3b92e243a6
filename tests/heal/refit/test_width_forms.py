"""What closed forms do for removed channels: optimal where a formula says so, never worse than the plain cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from billhook.anatomy import discover
from billhook.heal.refit.bias import compensated
from billhook.heal.refit.reconstruct import gram_of_reads, reconstruction
from billhook.heal.refit.unit_scales import scaled, unit_scales
from billhook.measure.patch import hooked
from billhook.plan.errors import InputError

PLAIN = ["llama", "gpt2", "bert", "opt", "gemma2", "vit", "falcon", "t5"]


def drawn(seed: int, n: int = 7, o: int = 4, tokens: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [tokens, n] that depend on each other, a write [o, n], and the inputs that stay."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, n, generator=generator) @ torch.randn(n, n, generator=generator) + 0.5
    kept = torch.randperm(n, generator=generator)[: n - 3].sort().values
    return h, torch.randn(o, n, generator=generator), kept


def lost(h: Tensor, weight: Tensor, kept: Tensor, new: Tensor, bias: Tensor | float = 0.0) -> float:
    return (h @ weight.T - h[:, kept] @ new.T - bias).square().sum().item()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1e-8, 1e-3, 0.1, 10.0]))
def test_nothing_beats_the_reconstruction_and_it_beats_the_plain_cut(seed: int, penalty: float) -> None:
    h, weight, kept = drawn(seed)
    gram = h.T @ h
    new = reconstruction(gram, weight, kept, penalty)
    strength = penalty * gram.diagonal().mean().item()

    def objective(v: Tensor) -> float:
        return lost(h, weight, kept, v) + strength * (v - weight[:, kept]).square().sum().item()

    assert lost(h, weight, kept, new) <= lost(h, weight, kept, weight[:, kept]) * 1.0001
    for step in torch.randn(5, *new.shape, generator=torch.Generator().manual_seed(seed)):
        assert objective(new) <= objective(new + 0.05 * step) * 1.0001


def test_a_channel_that_is_a_sum_of_others_is_rebuilt_exactly() -> None:
    h, weight, _ = drawn(3)
    h[:, 2] = 2 * h[:, 0] - h[:, 5]
    kept = torch.tensor([0, 1, 3, 4, 5, 6])
    new = reconstruction(h.T @ h, weight, kept, 1e-10)
    torch.testing.assert_close(h[:, kept] @ new.T, h @ weight.T, atol=1e-2, rtol=1e-3)


def test_without_data_reads_say_what_data_would() -> None:
    """The Gram matrix of channels that are linear, or products of two reads, on white inputs."""
    generator = torch.Generator().manual_seed(1)
    gate, up = torch.randn(2, 5, 6, generator=generator)
    x = torch.randn(400_000, 6, generator=generator)
    linear, product = x @ gate.T, (x @ gate.T) * (x @ up.T)
    for h, found in ((linear, gram_of_reads(gate)), (product, gram_of_reads(gate, up))):
        measured = h.T @ h / len(x)
        assert (found - measured).norm() < 0.05 * measured.norm()
    with pytest.raises(InputError, match="not of 3"):
        gram_of_reads(gate, up, gate)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_the_bias_takes_the_mean_error_away(seed: int) -> None:
    h, weight, kept = drawn(seed)
    old = torch.ones(4)
    bias = compensated(h.mean(0), weight, kept, old)
    error = h @ weight.T + old - h[:, kept] @ weight[:, kept].T - bias
    torch.testing.assert_close(error.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(compensated(h.mean(0), weight, kept), bias - old)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1e-8, 0.1, 10.0]))
def test_scales_solve_their_problem(seed: int, penalty: float) -> None:
    """Three units of 2, 3 and 2 inputs in mixed order; the second one goes."""
    h, weight, _ = drawn(seed)
    units, kept = torch.tensor([0, 1, 2, 1, 0, 2, 1]), torch.tensor([0, 2])
    gram = h.T @ h
    scales = unit_scales(gram, weight, units, kept, penalty)
    parts = torch.stack([h[:, units == u] @ weight[:, units == u].T for u in range(3)]).double()
    energy = penalty * parts.square().sum((1, 2)).mean()

    def objective(s: Tensor) -> float:
        out = s[0] * parts[0] + s[1] * parts[2]
        return ((parts.sum(0) - out).square().sum() + energy * (s - 1).square().sum()).item()

    for step in torch.randn(6, 2, generator=torch.Generator().manual_seed(seed)):
        assert objective(scales.double()) <= objective(scales.double() + 0.05 * step.double()) * 1.00001
    alive = torch.isin(units, kept)
    written = h[:, alive] @ scaled(weight, units, kept, scales).T
    expected = (scales[0] * parts[0] + scales[1] * parts[2]).float()
    torch.testing.assert_close(written, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", PLAIN)
def test_in_a_model_of_every_kind_each_form_writes_more_nearly_what_was_written(name: str) -> None:
    """Every third input of an MLP's write goes: what it writes, against the plain cut."""
    model = build(name)
    block = discover(model).stacks[0].blocks[1]
    (mlp,) = (s for s in block.sublayers if s.kind == "mlp")
    write: Any = model.get_submodule(mlp.writes[0].removesuffix(".weight"))
    seen: list[Tensor] = []
    with torch.no_grad(), hooked([(write, lambda module, args, kwargs, output: seen.append(args[0]))]):
        model(**FAMILIES[name].inputs(model, 4, None))
    h = seen[0].reshape(-1, seen[0].shape[-1])
    weight = write.weight.detach().T if type(write).__name__ == "Conv1D" else write.weight.detach()
    kept = torch.tensor([i for i in range(h.shape[1]) if i % 3])
    gram, units = h.T @ h, torch.arange(h.shape[1])
    plain = lost(h, weight, kept, weight[:, kept])
    scales = unit_scales(gram, weight, units, kept, 0.01)
    assert lost(h, weight, kept, scaled(weight, units, kept, scales)) < plain
    assert lost(h, weight, kept, reconstruction(gram, weight, kept, 0.01)) < 0.95 * plain
    assert lost(h, weight, kept, weight[:, kept], compensated(h.mean(0), weight, kept)) < plain


@pytest.mark.parametrize("kept", [[0, 0], [0, 9], [-1]])
def test_inputs_that_are_not_there_are_refused(kept: list[int]) -> None:
    h, weight, _ = drawn(0)
    with pytest.raises(InputError, match="kept"):
        reconstruction(h.T @ h, weight, torch.tensor(kept), 0.1)


def test_damaged_statistics_are_refused() -> None:
    h, weight, kept = drawn(0)
    gram = (h.T @ h).index_fill(0, torch.tensor([1]), float("nan"))
    for call in (
        lambda: reconstruction(gram, weight, kept, 0.1),
        lambda: unit_scales(gram, weight, torch.arange(7), kept, 0.1),
    ):
        with pytest.raises(InputError, match="NaN"):
            call()
