"""Norms behind what a sublayer writes: refitted channel by channel, in the family's own way to say a gain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, build
from heal.refit.test_closed_form import windows
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from billhook.anatomy import discover
from billhook.export.huggingface import save
from billhook.heal import closed_form, healed
from billhook.heal.refit.norms import ChannelMoments, Norm, norm_behind
from billhook.heal.refit.ridge import PENALTIES, solve
from billhook.measure.patch import observing
from billhook.plan.address import Address
from billhook.plan.plan import Keep, Plan
from billhook.surgery import apply

SANDWICH = {"gemma2": 1.0, "gemma3": 1.0, "olmo2": 0.0}  # what is added to the weight


def drawn(seed: int, tokens: int, noise: float) -> tuple[ChannelMoments, ChannelMoments, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(4, generator=generator)
    fit, held = ChannelMoments(), ChannelMoments()
    for moments in (fit, held):
        y = torch.randn(tokens, 4, generator=generator) * torch.tensor([0.1, 1, 1, 5])
        w = torch.rand(tokens, generator=generator) + 0.1
        moments.add(y, y * truth + noise * torch.randn(tokens, 4, generator=generator), w)
    return fit, held, truth


def test_true_factors_are_found() -> None:
    fit, held, truth = drawn(0, 50, noise=0.0)
    solution = solve(fit, held)
    assert solution is not None
    torch.testing.assert_close(solution.change, truth, atol=1e-4, rtol=1e-4)


def test_each_channel_is_a_ridge_regression_of_its_own() -> None:
    generator = torch.Generator().manual_seed(3)
    y, r = torch.randn(2, 20, 4, generator=generator)
    w = torch.rand(20, generator=generator)
    moments = ChannelMoments()
    for part in (slice(0, 7), slice(7, 20)):
        moments.add(y[part], r[part], w[part])
    change = moments.change(torch.tensor(0.5))
    assert change is not None
    for c in range(4):
        expected = (w * y[:, c] * r[:, c]).sum() / ((w * y[:, c] ** 2).sum() + 0.5)
        torch.testing.assert_close(change[c], expected, atol=1e-5, rtol=1e-5)
    error = (w[:, None] * (r - change * y).square()).sum().item()
    assert moments.error(change) == pytest.approx(error, rel=1e-4)


@given(st.integers(0, 10_000), st.integers(2, 30), st.sampled_from([0.0, 0.3, 3.0, 30.0]))
def test_the_held_back_error_never_rises(seed: int, tokens: int, noise: float) -> None:
    fit, held, _ = drawn(seed, tokens, noise)
    solution = solve(fit, held)
    if solution is not None:
        assert solution.error < held.energy
        assert solution.penalty in PENALTIES


def test_noise_is_refused() -> None:
    fit, held, _ = drawn(2, 50, noise=0.0)
    held.cross = -held.cross
    assert solve(fit, held) is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "cohere", "opt_post_norm", "dinov2", "bert", *SANDWICH])
def test_which_sublayers_write_through_a_norm(name: str) -> None:
    model = build(name)
    sublayers = [s for block in discover(model).stacks[0].blocks for s in block.sublayers]
    found = [norm_behind(model, sublayer) for sublayer in sublayers]
    if name in SANDWICH:
        assert [norm.weight for norm in found if norm] == [f"{s.output}.weight" for s in sublayers]
    else:
        assert not any(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SANDWICH)
def test_a_new_weight_puts_out_what_was_asked(name: str, dtype: torch.dtype) -> None:
    model: Any = build(name).to(dtype)
    weight = model.model.layers[1].post_feedforward_layernorm.weight
    with observing(model):
        weight[3] = -SANDWICH[name]  # a gain of 0
        norm = norm_behind(model, discover(model).stacks[0].blocks[1].sublayers[-1])
        assert isinstance(norm, Norm) and norm.gain[3] == 0
        u, change = torch.randn(7, 32, dtype=dtype), torch.randn(32)
        y = norm.module(u)
        new = norm.changed(change)
        step = norm.written(y, new)
        weight.copy_(new[norm.weight])
        tight = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
        torch.testing.assert_close(norm.module(u).float(), y.float() + step, **tight)
        torch.testing.assert_close(step, y.float() * change, **tight)


@pytest.mark.parametrize("name", SANDWICH)
def test_a_damaged_norm_comes_back(name: str) -> None:
    """The dropped MLP writes what the attention before it writes, each channel times a factor of its own."""
    model: Any = build(name)
    anatomy = discover(model)
    attention, mlp = anatomy.stacks[0].blocks[2].sublayers
    behind, factor = model.get_submodule(attention.output), torch.linspace(-0.8, 3, 32)
    seen: list[Tensor] = []
    hook = model.get_submodule(attention.writes[0].removesuffix(".weight")).register_forward_hook
    hook(lambda module, args, output: seen.append(type(behind).forward(behind, output)))
    model.get_submodule(mlp.output).forward = lambda hidden: factor * seen[-1].reshape(hidden.shape)
    healing = closed_form(model, anatomy, [mlp.address], windows(40))
    refit = healing.refits[0]
    assert refit.weight == f"{attention.output}.weight"
    assert refit.after < 1e-6 < 1e-2 < refit.before
    one = SANDWICH[name]
    gain, old = healing.tensors[refit.weight] + one, behind.weight + one
    torch.testing.assert_close(gain, old * (1 + factor), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", SANDWICH)
def test_reads_and_norms_heal_and_plain_transformers_reads_them(name: str, tmp_path: Path) -> None:
    """A block is gone; on text that no fit has seen the output is nearer to the dense one than before."""
    model = build(name)
    anatomy = discover(model)
    plan = Plan.of([Address("decoder", 2)])
    ids = windows(64).ids
    healing = closed_form(model, anatomy, plan, [{"input_ids": ids[:56]}])
    kept = [s for block in anatomy.stacks[0].blocks for s in block.sublayers if s.address.block != 2]
    norms = {f"{s.output}.weight" for s in kept}
    assert set(healing.tensors) <= norms | {name for s in kept for name in s.reads}
    assert norms & set(healing.tensors)
    behind_the_gap = {f"{s.output}.weight" for s in kept if s.address.block > 2}
    assert behind_the_gap < {refit.weight for refit in healing.refits}
    with healed(model, healing):
        applied = apply(model, anatomy, plan)
    save(applied, anatomy, plan, tmp_path)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with observing(model):
        dense = model(input_ids=ids[56:]).logits
        cut, now, stock = (m(input_ids=ids[56:]).logits for m in (apply(model, anatomy, plan), applied, reloaded))
    torch.testing.assert_close(stock, now, atol=1e-5, rtol=1e-5)
    assert (now - dense).square().mean() < (cut - dense).square().mean()


@pytest.mark.parametrize("name", SANDWICH)
def test_of_an_mlp_that_gets_narrower_the_norm_is_refitted(name: str) -> None:
    """What it writes is still normed, so some of what is missing is a matter of scale."""
    model = build(name)
    anatomy = discover(model)
    unit = Address("decoder", 2, "mlp")
    plan = Plan.of([], keeps=[Keep(unit=unit, inner="neuron", indices=tuple(range(16)))])
    healing = closed_form(model, anatomy, plan, [FAMILIES[name].inputs(model, 64, None)])
    refit = next(refit for refit in healing.refits if refit.weight == f"{anatomy.sublayer(unit).output}.weight")
    assert refit.taken and refit.after < refit.before
    assert not healing.refused and refit.weight in healing.tensors
