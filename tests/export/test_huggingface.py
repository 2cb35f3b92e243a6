"""What lies in a saved folder, and who can load it."""

from __future__ import annotations

import ast
import builtins
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build, params
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from billhook import export, models
from billhook.anatomy import Anatomy, discover
from billhook.anatomy.stubs import STUBS
from billhook.export.remote import auto_classes, remote_code
from billhook.models import building
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Keep, Plan
from billhook.plan.target import Target
from billhook.surgery import apply
from billhook.surgery.form import Form
from billhook.surgery.reopen import load

HETEROGENEOUS = Plan.of(["decoder.0.attention", "decoder.2.mlp", "decoder.3"])
UNIFORM = Plan.of(["decoder.0", "decoder.3"], Target.UNIFORM)
NARROW = Plan.of(
    ["decoder.1", "decoder.4.attention"],
    keeps=[
        Keep(unit=Address("decoder", 2, "mlp"), inner="neuron", indices=tuple(range(0, 48, 2))),
        Keep(unit=Address("decoder", 3, "attention"), inner="group", indices=(1,)),
    ],
)


@cache
def dense(name: str) -> tuple[PreTrainedModel, Anatomy]:
    model = build(name)
    return model, discover(model)


def saved(name: str, plan: Plan, out: Path, **extras: Any) -> PreTrainedModel:
    model, anatomy = dense(name)
    applied = apply(model, anatomy, plan)
    with building(out) as folder:
        export.save(applied, anatomy, plan, folder, **extras)
    return applied


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def test_whole_blocks_give_an_ordinary_checkpoint(tmp_path: Path) -> None:
    for target in (Target.UNIFORM, Target.REMOTE, Target.DECI, Target.ANY):
        saved("llama", Plan.of(UNIFORM.drops, target), tmp_path / target)
        assert not list((tmp_path / target).glob("*.py"))
        config = config_of(tmp_path / target)
        assert config["num_hidden_layers"] == 3
        assert not {"auto_map", "per_layer_config", "skip_sublayers", "block_configs"} & config.keys()
        _, info = AutoModelForCausalLM.from_pretrained(tmp_path / target, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_missing_sublayers_are_noted_in_the_new_numbers(tmp_path: Path) -> None:
    saved("llama", HETEROGENEOUS, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    assert config["per_layer_config"] == {"0": {"skip": ["attention"]}, "2": {"skip": ["mlp"]}}
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_billhook.LlamaForCausalLM"}


def test_per_layer_lists_shrink_with_the_right_members(tmp_path: Path) -> None:
    for name, keys in (("smollm3", ("layer_types", "no_rope_layers")), ("gemma3", ("layer_types",))):
        saved(name, UNIFORM, tmp_path / name)
        before, after = dense(name)[0].config.to_dict(), config_of(tmp_path / name)
        for key in keys:
            assert after[key] == [value for i, value in enumerate(before[key]) if i not in (0, 3)]


def test_nested_configs_note_it_where_it_belongs(tmp_path: Path) -> None:
    saved("gemma3_image", Plan.of(["vision.1.mlp", "decoder.2.attention"]), tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert "per_layer_config" not in config
    assert config["vision_config"]["per_layer_config"] == {"1": {"skip": ["mlp"]}}
    assert config["text_config"]["per_layer_config"] == {"2": {"skip": ["attention"]}}


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    for plan in (UNIFORM, HETEROGENEOUS):
        out = tmp_path / plan.target
        saved("llama", plan, out)
        assert "lm_head.weight" not in load_file(out / "model.safetensors")
        model = load(out).model
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model, anatomy = dense("llama")
    applied = apply(model, anatomy, HETEROGENEOUS).train()
    applied.requires_grad_(False)
    before = applied.config.to_dict()
    with building(tmp_path / "out") as folder:
        export.save(applied, anatomy, HETEROGENEOUS, folder)
    assert all(module.training for module in applied.modules())
    assert not any(p.requires_grad for p in applied.parameters())
    after = applied.config.to_dict()
    assert {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)} <= {"dtype", "architectures"}
    assert applied.config.use_cache
    applied.requires_grad_(True)  # the weights are shared with other tests


def test_all_small_files_come_along(tiny_lm: Path, tmp_path: Path) -> None:
    source = load(tiny_lm)
    anatomy = discover(source.model)
    for plan in (UNIFORM, HETEROGENEOUS):
        out = tmp_path / plan.target
        with building(out) as folder:
            export.save(apply(source.model, anatomy, plan), anatomy, plan, folder, source.tokenizer, source.folder)
        missing = {path.name for path in tiny_lm.iterdir()} - {path.name for path in out.iterdir()}
        assert not missing
        assert load(out).tokenizer.chat_template == source.tokenizer.chat_template


def test_only_safetensors_and_text_are_written(tmp_path: Path) -> None:
    saved("bart", HETEROGENEOUS, tmp_path / "out")
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".safetensors", ".py"}


def test_a_result_that_would_not_load_is_refused_before_writing(tmp_path: Path) -> None:
    model, anatomy = dense("llama")
    applied = apply(model, anatomy, UNIFORM)
    applied.config.intermediate_size = 50
    with (
        pytest.raises(
            InputError,
            match=r"would not load: .* wants \[36, 50\] for model\.layers\.0\.mlp\.down_proj.*, it has \[36, 48\]",
        ),
        building(tmp_path / "out") as folder,
    ):
        try:
            export.save(applied, anatomy, UNIFORM, folder)
        finally:
            assert not list(folder.iterdir())
    assert not (tmp_path / "out").exists()


def test_uniform_cannot_carry_what_is_already_heterogeneous(tmp_path: Path) -> None:
    saved("llama", HETEROGENEOUS, tmp_path / "first")
    source = load(tmp_path / "first")
    plan = Plan.of(["decoder.1"], Target.UNIFORM)
    anatomy = discover(source.model)
    with pytest.raises(InputError, match=r"target uniform cannot carry this model: it already lacks decoder\.0\."):
        export.save(apply(source.model, anatomy, plan), anatomy, plan, tmp_path)


def test_a_class_from_elsewhere_is_refused(tmp_path: Path) -> None:
    model, anatomy = dense("llama")
    applied = apply(model, anatomy, UNIFORM)
    applied.__class__ = type("Homemade", (type(applied),), {})
    with pytest.raises(InputError, match="Homemade is not a class of transformers"):
        export.save(applied, anatomy, UNIFORM, tmp_path)


@pytest.mark.parametrize("name", params)
def test_remote_code_is_short_and_needs_nothing_of_billhook(name: str) -> None:
    model, anatomy = dense(name)
    skips = frozenset(address for address, _ in anatomy.outline.sublayers())
    code = remote_code(type(model).__name__, anatomy, Form(skips))
    tree = ast.parse(code)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= {"__future__", "collections", "functools", "typing", "torch", "transformers"}
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) < 100, f"{len(lines)} lines"
    *rest, written = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert [ast.unparse(base) for base in written.bases] == [f"transformers.{type(model).__name__}"]
    assert {node.name for node in rest} <= {stub.__name__ for stub in STUBS.values()}, "no part of the model is copied"
    assert auto_classes(model.config, type(model).__name__)


@pytest.mark.parametrize("name", params)
def test_remote_code_has_all_that_it_names(name: str) -> None:
    """Also in lines that few models come to: narrower sublayers alone, sublayers missing alone, and both."""
    model, anatomy = dense(name)
    skips = frozenset([next(anatomy.outline.sublayers())[0]])
    widths = {(address, inner.kind): 1 for address, units in anatomy.inner.items() for inner in units}
    for form in (Form(skips), Form(skips, widths), Form(widths=widths)):
        if not form:
            continue
        tree = ast.parse(remote_code(type(model).__name__, anatomy, form))
        nodes = list(ast.walk(tree))
        known = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        known |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        known |= {n.arg for n in nodes if isinstance(n, ast.arg)}
        known |= {a.asname or a.name for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}
        assert {n.id for n in nodes if isinstance(n, ast.Name)} - known <= set(dir(builtins))


WITHOUT_BILLHOOK = """
import json, sys
sys.modules["billhook"] = None  # importing it fails
import torch, transformers
from safetensors.torch import load_file, save_file
for folder, auto, code in json.load(open(sys.argv[1])):
    model, info = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=code, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    inputs = load_file(folder + "/../inputs.safetensors")
    prompt = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
    with torch.no_grad():
        found = {"logits": model.eval()(**inputs).logits}
        for name, cache in (("cached", True), ("uncached", False)):
            found[name] = model.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=cache)
    save_file(found, folder + "/../found.safetensors")
"""


def test_loads_without_billhook(tmp_path: Path) -> None:
    jobs, expected = [], {}
    plans = dict.fromkeys(("llama", "gemma3", "bart", "mixtral"), HETEROGENEOUS)
    plans |= dict.fromkeys(("smollm3", "qwen3_moe"), UNIFORM) | dict.fromkeys(("phi3", "gpt2"), NARROW)
    for name, plan in plans.items():
        out = tmp_path / name / "out"
        ordinary = plan is UNIFORM  # and needs no code at all
        applied = saved(name, plan, out)
        inputs = FAMILIES[name].inputs(applied, 2, None)
        save_file(inputs, out.parent / "inputs.safetensors")
        with torch.no_grad():
            prompt = FAMILIES[name].prompt(applied, 2)
            generated = applied.generate(**prompt, max_new_tokens=8, do_sample=False)
            expected[name] = {"logits": applied(**inputs).logits, "cached": generated, "uncached": generated}
        jobs.append((str(out), "AutoModelForCausalLM" if ordinary else min(config_of(out)["auto_map"]), not ordinary))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    (tmp_path / "script.py").write_text(WITHOUT_BILLHOOK)
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path / "jobs.json"], check=True, env=environment, timeout=300
    )
    for name, tensors in expected.items():
        found = load_file(tmp_path / name / "found.safetensors")
        for key, value in tensors.items():
            torch.testing.assert_close(found[key], value, atol=1e-6, rtol=0, msg=f"{name} {key}")


def test_code_of_the_source_does_not_stay_in_the_config(tmp_path: Path) -> None:
    saved("llama", HETEROGENEOUS, tmp_path / "first")
    rest = Plan.of(["decoder.0", "decoder.2"])  # the blocks that lack something
    export.save_checkpoint(tmp_path / "first", rest, tmp_path / "second")
    assert "auto_map" not in config_of(tmp_path / "second")
    assert not list((tmp_path / "second").glob("*.py"))
    assert models.load(tmp_path / "second").model.config.num_hidden_layers == 2
