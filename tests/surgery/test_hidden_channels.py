"""The promises of surgery for narrower streams, on every family that can have one."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, build
from live import assert_cache_is_exact, inputs_of, logits, snapshot
from safetensors.torch import load_file
from streams import some_channels, zeroed
from transformers import PreTrainedModel
from widths import narrowings

from billhook import export
from billhook.anatomy import Anatomy, discover
from billhook.measure.cost import cost
from billhook.models import building
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import HiddenChannels, Keep, Plan
from billhook.plan.target import Target
from billhook.surgery import apply, simulate
from billhook.surgery.reopen import load, on_meta

THIN = (
    *("llama", "llama_bias", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "granite", "cohere"),
    *("smollm3", "mixtral", "qwen3_moe", "deepseek_v3", "vit"),
)


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@cache
def dense(name: str) -> tuple[PreTrainedModel, Anatomy]:
    model = build(name)
    return model, discover(model)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt2", "width of its heads follows"),
        ("olmoe", "width of its heads follows"),
        ("dinov2", "width of its MLPs follows"),
        ("gemma4", "an embedding of its own"),
        ("t5", "several streams meet"),
    ],
)
def test_every_other_family_says_why_not(name: str, reason: str) -> None:
    model, anatomy = dense(name)
    assert not anatomy.residuals
    stack = anatomy.outline.stacks[0].name
    with pytest.raises(InputError, match=f"hidden channels of {stack} .*{reason}"):
        apply(model, anatomy, Plan.of([], channels=[HiddenChannels(stack=stack, indices=(0, 1))]))


@pytest.mark.parametrize("name", THIN)
def test_simulated_and_applied_agree_and_cost_what_was_predicted(name: str) -> None:
    model, anatomy = dense(name)
    edit = some_channels(anatomy, 3)
    gone = [Address(edit.stack, 1, "mlp")]
    keeps = [
        keep for keep in narrowings(anatomy, 2, gone) if not anatomy.outline.stack(edit.stack).channel_multiple > 1
    ]
    before = snapshot(model)
    plan = Plan.of(gone, keeps=keeps, channels=[edit])
    applied = apply(model, anatomy, plan)
    assert snapshot(model) == before
    with simulate(model, anatomy, plan) as simulated:
        for batch, padding in inputs_of(name)[-1:]:
            expected = logits(name, simulated, batch, padding)
            assert torch.isfinite(expected).all()
            assert torch.equal(logits(name, applied, batch, padding), expected)
        if FAMILIES[name].generates:
            assert_cache_is_exact(name, simulated)
    assert snapshot(model) == before
    less = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in applied.parameters())
    whole, predicted = cost(anatomy.outline), cost(anatomy.outline, plan.drops, plan.keeps, channels=plan.channels)
    assert less == pytest.approx((whole["size"] - predicted["size"]) / anatomy.outline.bytes_per_param)
    assert cost(discover(applied).outline) == pytest.approx(predicted)


@pytest.mark.parametrize("name", THIN)
def test_what_is_gone_is_taken_for_zeros(name: str) -> None:
    model, anatomy = dense(name)
    edit = some_channels(anatomy, 4)
    applied = apply(model, anatomy, Plan.of([], channels=[edit]))
    intact = logits(name, model, 2, None)
    with zeroed(model, anatomy, edit):
        for batch, padding in inputs_of(name):
            expected = logits(name, model, batch, padding)
            torch.testing.assert_close(logits(name, applied, batch, padding), expected, atol=2e-3, rtol=1e-3)
        assert not torch.allclose(logits(name, model, 2, None), intact, atol=1e-1)
    assert torch.equal(logits(name, model, 2, None), intact)


@pytest.mark.parametrize("name", THIN)
def test_it_is_an_ordinary_checkpoint_in_memory_and_cut_on_disk(name: str, tmp_path: Path) -> None:
    model, anatomy = dense(name)
    plan = Plan.of([], target=Target.UNIFORM, channels=[some_channels(anatomy, 5)])
    applied = apply(model, anatomy, plan)
    with building(tmp_path / "memory") as folder:
        export.save(applied, anatomy, plan, folder)
    config = json.loads((tmp_path / "memory" / "config.json").read_text())
    assert config["hidden_size"] == len(plan.channels[0].indices) and "auto_map" not in config
    rebuilt = on_meta(type(model), type(model.config).from_dict(config))
    assert numbers(rebuilt) == numbers(applied)
    stock, info = getattr(transformers, config["architectures"][0]).from_pretrained(
        tmp_path / "memory", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for parameter in applied.parameters():
        parameter.data = parameter.data.clone()
    for batch, padding in inputs_of(name)[-1:]:
        torch.testing.assert_close(
            logits(name, stock.eval(), batch, padding), logits(name, applied, batch, padding), atol=1e-6, rtol=0
        )
    model.save_pretrained(tmp_path / "source")
    export.save_checkpoint(tmp_path / "source", plan, tmp_path / "disk")
    memory, disk = (load_file(tmp_path / folder / "model.safetensors") for folder in ("memory", "disk"))
    assert memory.keys() == disk.keys()
    assert all(torch.equal(disk[key], value) for key, value in memory.items())
    assert (tmp_path / "disk" / "config.json").read_text() == (tmp_path / "memory" / "config.json").read_text()


def numbers(model: Any) -> dict[str, Any]:
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) in (int, tuple) and name != "intermediate_dim"
    }


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "deepseek_v3"])
def test_with_drops_and_keeps_it_comes_back_from_disk(name: str, tmp_path: Path) -> None:
    """Tensors cut along two axes; what single sublayers lost is told apart from what all of them lost."""
    model, anatomy = dense(name)
    gone = [Address("decoder", 1, "mlp"), Address("decoder", 3)]
    plan = Plan.of(gone, keeps=narrowings(anatomy, 6, gone), channels=[some_channels(anatomy, 6)])
    applied = apply(model, anatomy, plan)
    with building(tmp_path / "memory") as folder:
        export.save(applied, anatomy, plan, folder)
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    export.save_checkpoint(tmp_path / "source", plan, tmp_path / "disk")
    for folder_name in ("memory", "disk"):
        loaded = load(tmp_path / folder_name).model
        assert loaded.config.hidden_size == len(plan.channels[0].indices)
        for batch, padding in inputs_of(name)[-1:]:
            torch.testing.assert_close(
                logits(name, loaded, batch, padding), logits(name, applied, batch, padding), atol=1e-6, rtol=0
            )


def test_keeping_every_channel_changes_nothing() -> None:
    model, anatomy = dense("gemma3")
    plan = Plan.of([], channels=[HiddenChannels(stack="decoder", indices=tuple(range(32)))])
    kept = apply(model, anatomy, plan).state_dict(keep_vars=True)
    assert all(kept[key] is value for key, value in model.state_dict(keep_vars=True).items())


def test_tied_embeddings_stay_tied() -> None:
    model, anatomy = dense("llama")
    applied: Any = apply(model, anatomy, Plan.of([], channels=[some_channels(anatomy, 7)]))
    assert applied.lm_head.weight is applied.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        ([HiddenChannels(stack="encoder", indices=(0,))], "has no encoder"),
        ([HiddenChannels(stack="decoder", indices=())], "none is kept"),
        ([HiddenChannels(stack="decoder", indices=(0, 1, 2))], "multiples of 4"),
        ([HiddenChannels(stack="decoder", indices=(0, 1, 2, 99))], "numbered from 0 to 31; there is no 99"),
        ([HiddenChannels(stack="decoder", indices=(-4, 1, 2, 3))], "numbered from 0 to 31; there is no -4"),
        ([HiddenChannels(stack="decoder", indices=(1, 0, 2, 3))], "must rise"),
        ([HiddenChannels(stack="decoder", indices=(0, 1, 2, 3))] * 2, "twice"),
    ],
)
def test_impossible_channels(edits: list[HiddenChannels], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        apply(*dense("llama_bias"), Plan.of([], channels=edits))


def test_numbers_that_the_config_ties_are_not_cut_together() -> None:
    keep = Keep(unit=Address("decoder", 1, "attention"), inner="group", indices=(0,))
    edit = HiddenChannels(stack="decoder", indices=(0, 1, 2, 3))
    with pytest.raises(InputError, match="ties their numbers"):
        apply(*dense("llama_bias"), Plan.of([], keeps=[keep], channels=[edit]))
    with pytest.raises(InputError, match="target deci"):
        apply(
            *dense("llama"), Plan.of([], Target.DECI, channels=[edit.model_copy(update={"indices": tuple(range(6))})])
        )


def test_a_plan_file_says_it_in_ranges(tmp_path: Path) -> None:
    plan = Plan.of([], channels=[HiddenChannels(stack="decoder", indices=(0, 1, 2, 3, 5))])
    plan.write(tmp_path / "plan.json")
    assert '"indices": "0-3,5"' in (tmp_path / "plan.json").read_text()
    assert Plan.read(tmp_path / "plan.json") == plan
