"""Scales: merged is unmerged, in the tensors there were; zeros stay; and they are trained where they pay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from heal.training.training_bed import PLAN, TOKENS, quick, run, text

from billhook.anatomy import discover
from billhook.heal import UNTOUCHED
from billhook.heal.judge import divergences
from billhook.heal.training import subject
from billhook.heal.training.as_saved import merged
from billhook.heal.training.loop import split
from billhook.heal.training.lora import linears
from billhook.heal.training.scales import Scaled, scales_of
from billhook.heal.training.train import train
from billhook.heal.training.tune import SUFFICES, subsets

CAUSAL = ["llama_bias", "gpt2", "phi3", "qwen3_moe", "falcon", "bloom", "opt", "deepseek_v3", "cohere"]
UP = "model.layers.0.mlp.up_proj"


def scales_in(model: Any) -> list[str]:
    blocks = discover(model).stacks[0].blocks
    return scales_of(model, [path for block in blocks for path in linears(model, block, block.path, block.path)])


@pytest.fixture
def all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune does not choose."""
    monkeypatch.setattr(subject, "least_expressive", lambda options, gain: options[-1])


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_merged_is_unmerged(name: str) -> None:
    """With biases and norms trained as well; removed, all is as it was."""
    model, before = build(name), build(name).state_dict()
    inputs = FAMILIES[name].inputs(model, 2, None)
    paths = [block.path for block in discover(model).stacks[0].blocks]
    dense = model(**inputs).logits
    holder = Scaled(model, paths, subsets(model, paths, scales_in(model))[-1])
    assert torch.equal(model(**inputs).logits, dense), "scales begin at one"
    generator = torch.Generator().manual_seed(3)
    for parameter in holder.parameters.values():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    unmerged = model(**inputs).logits
    assert (unmerged - dense).abs().max() > 0.1
    with holder.saved():
        torch.testing.assert_close(model(**inputs).logits, unmerged, atol=2e-4, rtol=2e-4)
    assert torch.equal(model(**inputs).logits, unmerged)
    new = merged(holder)
    assert {key: tensor.shape for key, tensor in new.items()} == {key: before[key].shape for key in new}
    plain = build(name)
    plain.load_state_dict(new, strict=False)
    torch.testing.assert_close(plain(**inputs).logits, unmerged, atol=2e-4, rtol=2e-4)
    holder.remove()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(model(**inputs).logits, dense)


def test_every_linear_has_scales_and_no_other_module() -> None:
    """Fused experts and the router have none, nor has a linear that lends its weight to another."""
    model = build("qwen3_moe")
    assert sum("mlp" in name for name in scales_in(model)) == 2 * 3
    model = build("llama")
    names = scales_in(model)
    assert len(names) == len(set(names)) == 5 * 7
    one, other = (model.get_submodule(path) for path in (UP, UP.replace("0", "3")))
    one.weight = other.weight
    assert set(names) - set(scales_in(model)) == {f"{UP}.scale", f"{UP}.scale".replace("0", "3")}


@pytest.mark.usefixtures("all_of_them")
@pytest.mark.parametrize("name", ["llama_bias", "gpt2", "phi3", "qwen3_moe"])
def test_trained_they_stay_in_the_shape_of_the_model(name: str, tmp_path: Path) -> None:
    """Each linear is its old self but for a factor a row; and it is judged as it is saved."""
    model, healing, record = run(name, quick("tune"), tmp_path / "state")
    old = dict(model.named_parameters())
    transposed = name == "gpt2"
    matrices = [key for key in healing.tensors if old[key].ndim == 2]
    assert matrices
    for key in matrices:
        now, was = (side.T if transposed else side for side in (healing.tensors[key], old[key].detach()))
        factor = (now * was).sum(1, keepdim=True) / (was * was).sum(1, keepdim=True)
        torch.testing.assert_close(now, factor * was)
        assert factor.std() > 1e-4
    (found,) = divergences(model, discover(model), PLAN, [healing], split(text().ids)[1])
    assert found == pytest.approx(min(look.held for look in record.curve), rel=1e-4)
    assert record.parameters == sum(
        healing.tensors[key].numel() if old[key].ndim == 1 else old[key].shape[1 if transposed else 0]
        for key in healing.tensors
    )


def masked(dtype: torch.dtype) -> Any:
    model = build("llama").to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in model.model.layers:
            for name, weight in block.named_parameters():
                if weight.ndim == 2 and "norm" not in name:
                    weight *= torch.rand(weight.shape, generator=generator) < 0.5
    return model


@pytest.mark.usefixtures("all_of_them")
def test_zeros_stay_and_what_is_judged_is_what_is_saved_in_bfloat16(tmp_path: Path) -> None:
    model = masked(torch.bfloat16)
    anatomy = discover(model)
    healing, record = train(
        model, anatomy, PLAN, UNTOUCHED, text(), quick("tune"), tokens=TOKENS, state=tmp_path / "state"
    )
    assert record.best > 0
    for key, tensor in healing.tensors.items():
        assert torch.equal(tensor == 0, model.get_parameter(key) == 0) and tensor.dtype == torch.bfloat16
    (now,) = divergences(model, anatomy, PLAN, [healing], split(text().ids)[1])
    assert now == pytest.approx(min(look.held for look in record.curve), rel=1e-6)


class Killed(Exception):
    pass


def stop(_: str, done: int, __: int) -> None:
    if done == 10:
        raise Killed


@pytest.mark.usefixtures("all_of_them")
@pytest.mark.parametrize("name", ["llama_bias", "gpt2", "opt_post_norm", "falcon_alibi"])
def test_with_biases_too_what_is_judged_is_what_is_saved_in_bfloat16(name: str, tmp_path: Path) -> None:
    model = build(name).bfloat16()
    anatomy = discover(model)
    healing, record = train(
        model, anatomy, PLAN, UNTOUCHED, text(), quick("tune"), tokens=TOKENS, state=tmp_path / "state"
    )
    assert record.best > 0 and any(key.endswith("bias") for key in healing.tensors)
    (now,) = divergences(model, anatomy, PLAN, [healing], split(text().ids)[1])
    assert now == pytest.approx(min(look.held for look in record.curve), rel=1e-6)


def test_what_was_chosen_at_first_stays_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would be chosen when the training goes on; nothing is probed again."""
    _, whole, expected = run("gpt2", quick("tune"), tmp_path / "whole")
    with pytest.raises(Killed):
        run("gpt2", quick("tune"), tmp_path / "state", progress=stop)
    monkeypatch.setattr(subject, "least_expressive", None)
    _, again, record = run("gpt2", quick("tune"), tmp_path / "state")
    assert record == expected and whole.tensors.keys() == again.tensors.keys()


@pytest.mark.usefixtures("all_of_them")
def test_interrupted_they_go_on(tmp_path: Path) -> None:
    """To the same bits."""
    _, whole, expected = run("gpt2", quick("tune"), tmp_path / "whole")
    with pytest.raises(Killed):
        run("gpt2", quick("tune"), tmp_path / "state", progress=stop)
    _, again, record = run("gpt2", quick("tune"), tmp_path / "state")
    assert record == expected
    assert whole.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in whole.tensors.items())


@pytest.mark.parametrize("without", [0.95, 0.8])
def test_they_are_trained_where_less_does_not_suffice(
    without: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As any subset: where biases and norms reach nine tenths of what all gain, scales are left out."""

    def gain(_: Any, names: Sequence[str], *rest: Any) -> float:
        if any(name.endswith(".scale") for name in names):
            return 1.0
        return without if len({name.endswith("bias") for name in names}) == 2 else 0.5

    monkeypatch.setattr(subject, "_gain", gain)
    model, healing, _ = run("gpt2", quick("tune"), tmp_path / "state")
    assert healing.tensors
    assert any(model.get_parameter(key).ndim == 2 for key in healing.tensors) == (without < SUFFICES)
