"""Paths of low rank beside linears with zeros: the nearest of their rank, on every decoder, and by stock tools."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCABULARY, build
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import billhook
from billhook.anatomy import discover
from billhook.data import Windows
from billhook.export.huggingface import save
from billhook.heal import UNTOUCHED, Healing
from billhook.heal.healing import carried_out
from billhook.heal.judge import divergences
from billhook.heal.refit.eora import SHARE, eora, nearest, rank_of, size_of
from billhook.measure.cost import CostModel, path_costs
from billhook.measure.sums import Trace
from billhook.models.adapter import attached
from billhook.plan.budget import Budget
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.target import Target
from billhook.recipes.catalogue import load
from billhook.recipes.find import find, pose_for

DECODERS = [name for name, f in FAMILIES.items() if f.generates and list(f.stacks) == ["decoder"] and name != "gemma4"]
WINDOWS = Windows.of(torch.randint(3, VOCABULARY, (16, 24), generator=torch.Generator().manual_seed(2)), "noise")


def masked(model: Any, place: Path, recipe: str = "magnitude-sparse") -> tuple[Plan, Healing]:
    about: Any = SimpleNamespace(model=model, anatomy=discover(model))
    problem = pose_for(load(recipe), about.anatomy.outline, Budget.parse("params=0.7"), Target.UNIFORM)
    found = find(load(recipe), about, problem, WINDOWS, Trace(), seed=0, place=place, progress=None)
    return found.plan(Target.UNIFORM), found.healing or UNTOUCHED


def test_no_other_matrix_of_the_rank_is_nearer_on_these_inputs() -> None:
    """By the paper's own way: the error in the eigenspace of the inputs, cut off, projected back."""
    torch.manual_seed(0)
    for outputs, inputs in ((6, 9), (9, 6)):
        lack, x = torch.randn(outputs, inputs), torch.randn(50, inputs) * torch.logspace(-1, 1, inputs)
        seen = x.T @ x
        a, b = nearest(lack, seen, 3)
        assert a.shape == (3, inputs) and b.shape == (outputs, 3)
        values, vectors = torch.linalg.eigh(seen.double())
        u, s, v = torch.linalg.svd(lack.double() @ vectors * values.sqrt(), full_matrices=False)
        published = (u[:, :3] * s[:3]) @ v[:3] / values.sqrt() @ vectors.T
        torch.testing.assert_close(b @ a, published.float(), rtol=1e-3, atol=1e-4)
        plain = torch.linalg.svd(lack)
        blind = (plain[0][:, :3] * plain[1][:3]) @ plain[2][:3]
        errors = [((lack - product) @ x.T).square().sum() for product in (b @ a, blind)]
        assert errors[0] < errors[1]


@pytest.mark.parametrize("name", DECODERS)
def test_stock_tools_load_what_was_fitted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros stay zeros, paths are the same ones in Billhook and in peft, and what they cost is counted."""
    monkeypatch.setattr("billhook.heal.refit.eora.divergences", lambda *_: [2.0, 1.0])  # noise need not be better
    model = build(name)
    anatomy = discover(model)
    plan, start = masked(model, tmp_path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    healing = eora(model, anatomy, plan, start, WINDOWS)
    assert not healing.tensors and all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    gone = {f"{anatomy.block(edit.unit.parent).path}.{inside}" for edit in plan.sparsities for inside in edit.zeros}
    assert gone == {f"{path}.weight" for path in healing.paths} | healing.left_alone.keys()
    assert bool(healing.left_alone) == any(model.get_parameter(weight).ndim == 3 for weight in gone)

    small = carried_out(model, anatomy, plan, healing)
    assert attached(small).keys() == healing.paths.keys() and not attached(model)
    save(small, anatomy, plan, tmp_path / "out")
    inputs = FAMILIES[name].inputs(small, 3, "left")
    with torch.no_grad():
        wanted, cut = (side(**inputs).logits for side in (small, carried_out(model, anatomy, plan, start)))
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(base(**inputs).logits, cut, rtol=1e-4, atol=1e-4)
        stock = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
        torch.testing.assert_close(stock(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
        back = billhook.load(tmp_path / "out").model
        torch.testing.assert_close(back(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - cut).abs().max() > 1e-2
    zeros = sum(int((p == 0).sum()) for n, p in back.named_parameters() if n in gone)
    assert zeros == sum(sum(edit.zeros.values()) for edit in plan.sparsities)

    count = sum(a.numel() + b.numel() for a, b in healing.paths.values())
    assert count == size_of(model, anatomy, "decoder")
    dense, now = CostModel(anatomy.outline).dense, CostModel(discover(back).outline).dense
    added = path_costs(anatomy.outline, count)
    assert {kind: now[kind] - dense[kind] for kind in added} == pytest.approx(added)
    assert {now[kind] - dense[kind] for kind in now if kind not in added} == {0}


def test_a_path_has_a_tenth_of_the_parameters() -> None:
    assert rank_of(576, 1536) * (576 + 1536) == pytest.approx(SHARE * 576 * 1536, rel=0.02)
    assert rank_of(2, 3) == 1


def test_the_weights_that_came_with_the_masks_stay(tmp_path: Path) -> None:
    """And each block is fitted on what the paths before it leave: all zeros at once would be another stream."""
    model = build("llama")
    anatomy = discover(model)
    plan, start = masked(model, tmp_path, "sparsegpt")
    healing = eora(model, anatomy, plan, start, WINDOWS)
    assert healing.tensors == start.tensors and start.tensors
    assert (healing.tokens, healing.work) == (14 * 24, 2 * 5 * 14 * 24), "each block once for its moments, once behind"
    assert healing.cut is not None and healing.healed is not None and healing.healed < healing.cut
    small, name = carried_out(model, anatomy, plan, healing), "model.layers.4.mlp.down_proj"
    given: list[torch.Tensor] = []
    small.get_submodule(name).register_forward_hook(lambda _, args, __: given.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        small.get_submodule("model.layers.4").mlp.gate_proj.beside.b.zero_()
        small.get_submodule("model.layers.4").mlp.up_proj.beside.b.zero_()
        for own in small.get_submodule("model.layers.4").self_attn.children():
            if hasattr(own, "beside"):
                own.beside.b.zero_()
        small(WINDOWS.ids[:-2])
    lack = model.get_parameter(f"{name}.weight") - start.tensors[f"{name}.weight"] * (
        small.get_parameter(f"{name}.weight") != 0
    )
    a, b = nearest(lack.detach(), given[0].T @ given[0], rank_of(*lack.shape))
    torch.testing.assert_close(healing.paths[name][1] @ healing.paths[name][0], b @ a, rtol=1e-3, atol=1e-4)


def test_paths_that_help_nothing_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    anatomy = discover(model)
    plan, start = masked(model, tmp_path)
    monkeypatch.setattr(
        "billhook.heal.refit.eora.nearest", lambda lack, _, rank: (-lack[:rank], torch.eye(len(lack))[:, :rank])
    )
    found = eora(model, anatomy, plan, start, WINDOWS)
    assert found.refused and not found.paths
    held = WINDOWS.ids[-2:]
    assert divergences(model, anatomy, plan, [start], held) == [found.cut]


def test_what_it_cannot_do_is_one_line(tmp_path: Path) -> None:
    model = build("llama")
    anatomy = discover(model)
    plan, start = masked(model, tmp_path)
    with pytest.raises(InputError, match="sets no weights to zero"):
        eora(model, anatomy, Plan.of(["decoder.1"]), UNTOUCHED, WINDOWS)
    both = plan.model_copy(update={"edits": (*plan.edits, *Plan.of(["decoder.1"]).edits)})
    with pytest.raises(InputError, match="do nothing else"):
        eora(model, anatomy, both, start, WINDOWS)
    with pytest.raises(InputError, match="at least two windows"):
        eora(model, anatomy, plan, start, Windows.of(WINDOWS.ids[:1], "one"))


def test_a_damaged_or_foreign_adapter_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    anatomy = discover(model)
    plan, start = masked(model, tmp_path)
    small = carried_out(model, anatomy, plan, eora(model, anatomy, plan, start, WINDOWS))
    save(small, anatomy, plan, tmp_path / "out")
    place = tmp_path / "out" / "adapter"
    config, tensors = (
        json.loads((place / "adapter_config.json").read_text()),
        load_file(place / "adapter_model.safetensors"),
    )
    name, tensor = next(iter(tensors.items()))

    def refused(match: str, changes: dict[str, Any] | None = None, **other: torch.Tensor) -> None:
        (place / "adapter_config.json").write_text(json.dumps(config | (changes or {})))
        save_file(tensors | other, place / "adapter_model.safetensors")
        with pytest.raises(InputError, match=match) as error:
            billhook.load(tmp_path / "out")
        assert "\n" not in str(error.value)

    refused("not an adapter that Billhook wrote", {"alpha_pattern": {}})
    refused("not an adapter that Billhook wrote", {"peft_type": "LOHA"})
    refused("cannot be read as an adapter", {"rank_pattern": {"model.layers.9.mlp.up_proj": 1}, "alpha_pattern": {}})
    refused("no path that fits", None, **{name: tensor[:, 1:].contiguous()})
    refused("holds NaN or Inf", None, **{name: tensor * float("nan")})
    (place / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read as an adapter"):
        billhook.load(tmp_path / "out")
