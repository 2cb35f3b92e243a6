"""Blocks shared out over two processes (FSDP2): the result of one, half of the weights each, a state for any number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from heal.training.pairs import SHARDED, ended, killed, sharing
from heal.training.training_bed import PLAN, TOKENS, quick, text
from safetensors.torch import load_file

from billhook.anatomy import discover
from billhook.heal import UNTOUCHED, Healing
from billhook.heal.training.launch import require_precision, sharded
from billhook.heal.training.train import train
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.record import TrainingRecord

CHANGES = {"rate": 3e-3}
NARROW = {
    "edits": [
        {"kind": "drop", "unit": "decoder.1.attention"},
        {"kind": "keep", "unit": "decoder.2.mlp", "inner": "neuron", "indices": list(range(0, 48, 2))},
    ]
}


def job(name: str, method: str, family: str = "llama", **more: Any) -> dict[str, Any]:
    return {"name": name, "method": method, "family": family, "changes": CHANGES, **more}


JOBS = [
    job("lora", "lora"),
    job("distill", "distill"),
    job("tail", "tail"),
    job("lisa", "lisa"),
    job("tune", "tune", "llama_bias", plan=NARROW),
    job("scales", "tune", "phi3"),
    job("tune-half", "tune", "llama_bias", plan=NARROW, dtype="bfloat16"),
    job("lisa-half", "lisa", dtype="bfloat16"),
    job("ist", "ist", "deepseek_v3"),
    job("fpf", "fpf", "gpt2"),
    job("skips", "skips", "qwen3_moe"),
    job("routing", "kv-routing"),
]


def alone(work: dict[str, Any], state: Path, progress: Any = None) -> tuple[Healing, TrainingRecord]:
    model = build(work["family"]).to(getattr(torch, work.get("dtype", "float32")))
    plan = Plan.model_validate(work["plan"]) if "plan" in work else PLAN
    return train(
        model, discover(model), plan, UNTOUCHED, text(), quick(work["method"], **CHANGES), tokens=TOKENS, state=state,
        progress=progress,
    )  # fmt: skip


def written(place: Path, name: str, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / f"{name}-{rank}.json").read_text())
    return found


def same_curve(place: Path, name: str, record: TrainingRecord, within: float = 1e-3) -> None:
    curve = TrainingRecord.model_validate_json(json.dumps(written(place, name)["record"])).curve
    assert [look.held for look in curve] == pytest.approx([look.held for look in record.curve], rel=within)
    assert [look.loss for look in curve[1:]] == pytest.approx([look.loss for look in record.curve[1:]], rel=within)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two did all jobs, and the last of them in two runs: they were killed and started again."""
    place = tmp_path_factory.mktemp("shared")
    killed(sharing(place, [job("killed", "lisa", dies=10)], **SHARDED))
    assert not list(place.glob("*.part")) and not list(place.glob("killed-0*"))
    (place / "left").write_bytes((place / "killed-state").read_bytes())
    ended(sharing(place, [*JOBS, job("killed", "lisa")], **SHARDED))
    return place


@pytest.mark.parametrize("work", JOBS, ids=[work["name"] for work in JOBS])
def test_two_that_share_out_the_blocks_are_one(work: dict[str, Any], place: Path, tmp_path: Path) -> None:
    """Every method; blocks that lost a part or got narrower; fused weights, experts and tied embeddings."""
    healing, record = alone(work, tmp_path / "state")
    first, second = (load_file(place / f"{work['name']}-{rank}.safetensors") for rank in (0, 1))
    assert healing.tensors.keys() == first.keys() == second.keys() != set()
    within = 2e-3 if "dtype" not in work else 2e-2
    for key, tensor in healing.tensors.items():
        torch.testing.assert_close(first[key], tensor, atol=within, rtol=within)
        assert torch.equal(first[key], second[key])
    same_curve(place, work["name"], record, within / 2)
    assert record.curve[-1].held < record.curve[0].held
    if work["method"] == "tune":
        assert any(tensor.ndim == 2 for tensor in healing.tensors.values()), "scales among them"


@pytest.mark.parametrize("name", ["distill", "lora", "lisa"])
def test_each_has_half_of_every_weight_and_each_weight_is_there_once(name: str, place: Path) -> None:
    """Those that both models have in common included."""
    model = build("llama")
    blocks = [model.get_submodule(block.path) for block in discover(model).stacks[0].blocks]
    dense = sum(p.numel() for block in blocks for p in block.parameters())
    norm = blocks[2].post_attention_layernorm  # goes with its MLP
    dropped = sum(p.numel() for part in (blocks[1], blocks[2].mlp, norm) for p in part.parameters())
    found = [written(place, name, rank) for rank in (0, 1)]
    own = dense - dropped if name == "lora" else dense  # the text needs no teacher
    assert sum(side["here"] for side in found) == own + found[0]["record"]["parameters"]
    assert abs(found[0]["here"] - found[1]["here"]) < own / 20
    assert found[0]["whole"] == found[1]["whole"] == 0


def test_killed_as_two_it_goes_on_as_two_and_as_one(place: Path, tmp_path: Path) -> None:
    """The state has whole tensors, so it does not matter how many read it; only the first writes it."""
    whole, record = alone(job("killed", "lisa"), tmp_path / "whole")
    steps: list[int] = []
    (tmp_path / "one").write_bytes((place / "left").read_bytes())
    one, again = alone(job("killed", "lisa"), tmp_path / "one", lambda _, done, __: steps.append(done))
    assert steps == [9, 10, 11, 12], "after the last look"
    two = load_file(place / "killed-0.safetensors")
    assert written(place, "killed")["steps"] == 4
    for key, tensor in whole.tensors.items():
        torch.testing.assert_close(one.tensors[key], tensor, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(two[key], tensor, atol=2e-3, rtol=2e-3)
    assert [look.held for look in again.curve] == pytest.approx([look.held for look in record.curve], rel=1e-3)
    same_curve(place, "killed", record)


def test_what_a_launch_asks_for_and_would_not_get_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not sharded()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="add --fsdp_version 2"):
        sharded()
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert not sharded(), "one process has nobody to share with"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sharded()
    for name, value, said in (
        ("FSDP_OFFLOAD_PARAMS", "true", "--fsdp_offload_params"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "--fsdp_activation_checkpointing"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "--fsdp_reshard_after_forward"),
    ):
        with monkeypatch.context() as one:
            one.setenv(name, value)
            with pytest.raises(InputError, match=said):
                sharded()
    require_precision(torch.float32)
    for asked, dtype in (("fp16", torch.float16), ("fp16", torch.float32), ("bf16", torch.float32)):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
        with pytest.raises(InputError, match=f"leave out --mixed_precision {asked}"):
            require_precision(dtype)
    require_precision(torch.bfloat16)
