"""Bias compensation and healing without data, as ways to heal what got narrower: every family, saved and reopened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, build
from heal.refit.test_narrower import narrowed, windows
from safetensors.torch import load_file

import billhook
from billhook.anatomy import discover
from billhook.export import save_checkpoint
from billhook.export.huggingface import save
from billhook.heal.refit.bias import bias_compensation
from billhook.heal.refit.data_free import PENALTY, data_free
from billhook.heal.refit.reconstruct import gram_of_reads, reconstruction
from billhook.measure.patch import hooked
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Keep, Plan
from billhook.recipes import heal as heal_walk
from billhook.recipes.heal import applied, differing
from billhook.recipes.opened import Opened, opened
from billhook.surgery import apply
from billhook.surgery.reopen import load

UNIT = Address("decoder", 1, "mlp")


def bed(name: str) -> Any:
    model: Any = build(name)
    loaded: Any = type("Loaded", (), {"model": model, "source": name})
    return Opened(loaded, discover(model), torch.float32)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "falcon", "gemma2", "mixtral"])
def test_biases_make_up_for_the_mean_and_are_saved_and_reopened(name: str, tmp_path: Path) -> None:
    open_ = bed(name)
    anatomy = open_.anatomy
    plan = Plan.of([Address("decoder", 3)], "remote", narrowed(anatomy, [Address("decoder", 3)]))
    healing = bias_compensation(open_.model, anatomy, plan, windows())
    before = {key: value.clone() for key, value in open_.model.state_dict().items()}
    config = open_.model.config.to_dict()
    small = applied(open_, plan, healing)
    assert healing.tensors
    assert before.keys() == open_.model.state_dict().keys() and open_.model.config.to_dict() == config
    inputs = FAMILIES[name].inputs(open_.model, 2, None)
    with torch.no_grad():
        expected = small(**inputs)[0]
        assert not torch.allclose(expected, apply(open_.model, anatomy, plan)(**inputs)[0], atol=1e-3)
        save(small, anatomy, plan, tmp_path)
        torch.testing.assert_close(load(tmp_path).model(**inputs)[0], expected)
        auto = json.loads((tmp_path / "config.json").read_text()).get("auto_map")
        stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=bool(auto)).eval()
        torch.testing.assert_close(stock(**inputs)[0], expected)
        reopened = load(tmp_path).model
        again = differing(reopened, open_, plan, tmp_path)
        assert again.tensors.keys() >= healing.tensors.keys()
        torch.testing.assert_close(applied(open_, plan, again)(**inputs)[0], expected)


def test_the_bias_is_what_the_lost_neurons_wrote_on_average() -> None:
    open_ = bed("llama")
    kept = tuple(range(0, 48, 3))
    plan = Plan.of([], keeps=[Keep(unit=UNIT, inner="neuron", indices=kept)])
    text = windows(4)
    seen = []
    down = open_.model.model.layers[1].mlp.down_proj
    with torch.no_grad(), hooked([(down, lambda module, args, kwargs, output: seen.append(args[0]))]):
        open_.model(input_ids=text.ids)
    (name, bias), *rest = bias_compensation(open_.model, open_.anatomy, plan, text).tensors.items()
    gone = [i for i in range(48) if i not in kept]
    wrote = (seen[0][..., gone] @ down.weight[:, gone].T).reshape(-1, 36).mean(0)
    assert name == "model.layers.1.mlp.down_proj.bias" and not rest
    torch.testing.assert_close(bias, wrote, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_with_added_biases_is_cut_again(tmp_path: Path) -> None:
    """On disk and in memory alike; what a dropped sublayer had goes with it."""
    open_ = bed("llama")
    keeps = narrowed(open_.anatomy)
    plan = Plan.of([], "remote", keeps)
    small = applied(open_, plan, bias_compensation(open_.model, open_.anatomy, plan, windows()))
    save(small, open_.anatomy, plan, tmp_path / "one") if (tmp_path / "one").mkdir() is None else None
    once = load(tmp_path / "one").model
    more = Plan.of(["decoder.1", "decoder.2.attention"], "remote")
    (tmp_path / "two").mkdir()
    save(apply(once, discover(once), more), discover(once), more, tmp_path / "two")
    save_checkpoint(tmp_path / "one", more, tmp_path / "disk")
    listed = json.loads((tmp_path / "two" / "config.json").read_text())["added_biases"]["decoder"]
    assert listed["1"] == ["mlp.down_proj"] and listed["2"] == ["mlp.down_proj", "self_attn.o_proj"]
    two, disk = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "disk"))
    assert two.keys() == disk.keys() and all(torch.equal(two[key], disk[key]) for key in two)
    assert "model.layers.1.mlp.down_proj.bias" in two


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_without_data_a_neuron_that_is_the_multiple_of_another_is_rebuilt(name: str) -> None:
    """In a linear MLP exactly; here the write of the one that stays takes up that of the one that goes."""
    open_ = bed(name)
    model, anatomy = open_.model, open_.anatomy
    (inner,) = anatomy.inner[UNIT]
    count = inner.count
    with torch.no_grad():
        for piece in inner.slices:
            tensor = model.get_parameter(piece.parameter) if not piece.writes else None
            if tensor is not None:
                rows = tensor.movedim(piece.axis, 0)
                rows[piece.start] = rows[piece.start + 1]
    plan = Plan.of([], keeps=[Keep(unit=UNIT, inner="neuron", indices=tuple(range(1, count)))])
    healing = data_free(model, anatomy, plan)
    small = applied(open_, plan, healing)
    inputs = FAMILIES[name].inputs(model, 2, None)
    with torch.no_grad():
        wanted, cut, healed = (m(**inputs)[0] for m in (model, apply(model, anatomy, plan), small))
    assert (healed - wanted).norm() < 0.6 * (cut - wanted).norm()


@pytest.mark.parametrize(
    ("name", "norm", "offset"),
    [
        ("llama", "post_attention_layernorm", 0),
        ("gemma2", "pre_feedforward_layernorm", 1),
        ("olmo2", None, 0),
        ("cohere", "input_layernorm", 0),
        ("stablelm", "post_attention_layernorm", 0),
        ("stablelm_parallel", "input_layernorm", 0),
    ],
)
def test_without_data_a_neuron_reads_through_the_norm_before_it(name: str, norm: str | None, offset: int) -> None:
    """Whatever stands for a gain of 1 in its weight; a norm behind the writes, as in olmo2, is none."""
    open_ = bed(name)
    kept = torch.arange(0, 48, 2)
    plan = Plan.of([], keeps=[Keep(unit=UNIT, inner="neuron", indices=tuple(kept.tolist()))])
    found = data_free(open_.model, open_.anatomy, plan).tensors["model.layers.1.mlp.down_proj.weight"]
    layer = open_.model.model.layers[1]
    weight = torch.ones(()) if norm is None else layer.get_submodule(norm).weight.detach() + offset
    assert norm is None or not torch.allclose(weight, weight.mean())
    gram = gram_of_reads(*(read.weight.detach() * weight for read in (layer.mlp.gate_proj, layer.mlp.up_proj)))
    expected = reconstruction(gram, layer.mlp.down_proj.weight.detach(), kept, PENALTY)
    torch.testing.assert_close(found[:, kept], expected)


def test_what_it_cannot_do_is_left_alone_or_refused(tiny_lm: Path, tmp_path: Path) -> None:
    open_ = bed("llama")
    heads = Keep(unit=Address("decoder", 1, "attention"), inner="group", indices=(0,))
    neurons = Keep(unit=UNIT, inner="neuron", indices=(0, 1))
    healing = data_free(open_.model, open_.anatomy, Plan.of([], keeps=[heads, neurons]))
    assert list(healing.left_alone) == ["model.layers.1.self_attn.o_proj.weight"]
    for heal in (data_free, bias_compensation):
        with pytest.raises(InputError, match="this plan"):
            heal(open_.model, open_.anatomy, Plan.of(["decoder.1"]), windows(2))
    for how in ("bias", "data-free"):
        with pytest.raises(InputError, match="takes none away"):
            billhook.compress(tiny_lm, budget="params=0.8", out=tmp_path / "a", recipe="block-influence", heal=how)
    with pytest.raises(InputError, match="target deci cannot carry"):
        billhook.compress(tiny_lm, budget="params=0.8", out=tmp_path / "a", recipe="flap", target="deci")


def test_flap_and_magnitude_all_the_way(tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billhook.recipes.texts.HEALING_TOKENS", 4096)
    out = tmp_path / "flap"
    run = billhook.compress(tiny_lm, budget="params=0.8", out=out, recipe="flap", max_new_tokens=2)
    assert run.healing is not None and run.healing.method == "bias"
    small: Any = opened(out, dtype=None, device="cpu", trust_remote_code=False).model
    assert any(name.endswith("down_proj.bias") for name, _ in small.named_parameters())
    healed = heal_walk.heal(out, out=tmp_path / "again", method="closed-form", max_new_tokens=2)
    assert healed.healing is not None


def test_biases_that_were_added_are_still_there_after_a_training(tmp_path: Path) -> None:
    from billhook.plan.record import HealStep
    from billhook.recipes.heal import record_of
    from billhook.recipes.training import taught

    open_ = bed("llama")
    open_.loaded.left_out = ()
    plan = Plan.of([], "remote", narrowed(open_.anatomy))
    start = bias_compensation(open_.model, open_.anatomy, plan, windows())
    step = HealStep(method="tune", text="noise", seed=0, tokens=192)
    text = windows()
    done = taught(open_, plan, step, start, record_of(start), text, 192, tmp_path, None)
    ids = windows(2, seed=6).ids
    for number, small in enumerate((done.begun, done.compressed)):
        (tmp_path / str(number)).mkdir()
        save(small, open_.anatomy, plan, tmp_path / str(number))
        with torch.no_grad():
            wanted = small(ids).logits
            torch.testing.assert_close(load(tmp_path / str(number)).model(ids).logits, wanted)
