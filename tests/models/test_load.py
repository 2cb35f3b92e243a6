"""Loading: what comes in comes in whole, and anything else is refused in one clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import build, params
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from billhook.models import load
from billhook.plan.errors import InputError
from billhook.surgery.reopen import skeleton


@pytest.fixture
def folder(tiny_lm: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_lm, tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: object) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(source: object, *words: str, **options: object) -> None:
    with pytest.raises(InputError) as caught:
        load(source, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_a_folder_loads_as_it_is(tiny_lm: Path) -> None:
    loaded = load(tiny_lm)
    assert type(loaded.model) is type(build("llama"))
    assert not loaded.model.training
    assert loaded.model.dtype == torch.float32
    assert loaded.folder == tiny_lm and loaded.source == str(tiny_lm)
    assert loaded.tokenizer.chat_template
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.model.generation_config.eos_token_id == 2
    stored = load_file(tiny_lm / "model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in loaded.model.named_parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_is_what_was_asked(tiny_lm: Path, dtype: object) -> None:
    assert {p.dtype for p in load(tiny_lm, dtype=dtype).model.parameters()} == {torch.bfloat16}  # type: ignore[arg-type]


def test_dtype_none_keeps_the_checkpoints_own(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    edit_config(folder, dtype="bfloat16")
    assert load(folder).model.dtype == torch.bfloat16


@pytest.mark.parametrize("family", params)
def test_every_family_loads_as_itself(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded.model) is type(model)
    expected = model.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in loaded.model.state_dict().items())
    assert loaded.tokenizer is None


def test_sharded_checkpoints_load(tiny_lm: Path, tmp_path: Path) -> None:
    load(tiny_lm).model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    expected = load_file(tiny_lm / "model.safetensors")
    assert all(torch.equal(expected[name], value) for name, value in load(tmp_path).model.named_parameters())
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(tmp_path, shard.name, "missing")


def test_nothing_is_printed_and_settings_come_back(tiny_lm: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    logging.set_verbosity_info()
    try:
        load(tiny_lm)
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before[0])
        if not before[1]:
            logging.disable_progress_bar()
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_wrap_changes_the_class_that_is_built(tiny_lm: Path) -> None:
    seen = []

    def wrap(cls: type) -> type:
        seen.append(cls)
        return type("Wrapped", (cls,), {"mark": 1})

    model = load(tiny_lm, wrap=wrap).model
    assert seen == [type(build("llama"))] and model.mark == 1


def test_missing_weights_are_never_left_random(folder: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    edit_weights(folder, lambda t: t.pop(name))
    refused(folder, "lacks", name, type(build("llama")).__name__)


def test_extra_weights_are_never_dropped(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({"model.layers.9.extra.weight": torch.ones(2)}))
    refused(folder, "no place", "model.layers.9.extra.weight")


def test_the_head_of_another_task_is_left_out_by_name(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"extra_head.weight": torch.ones(2, 2)}))
    loaded = load(folder)
    assert loaded.left_out == ("extra_head.weight",)
    assert not hasattr(loaded.model, "extra_head")


def test_wrong_shapes_are_named(folder: Path) -> None:
    edit_config(folder, intermediate_size=80)
    refused(folder, "mlp.down_proj.weight", "(36, 48)", "(36, 80)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_weight_is_named(folder: Path, value: float) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    edit_weights(folder, lambda t: t[name].view(-1)[5:6].fill_(value))
    refused(folder, name, "NaN or Inf")


def test_a_truncated_file_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, str(path), "cut short")


def test_a_file_of_noise_is_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 1000)
    refused(folder, "model.safetensors", "corrupt")


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": {"a": "../../secret.safetensors"}}'])
def test_a_bad_index_is_named(folder: Path, index: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    refused(folder, "model.safetensors.index.json")


def test_pickles_are_refused(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "pickle", "safetensors")


def test_quantised_weights_are_refused(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(folder, "quantised by gptq")


def test_strangers_code_never_runs(folder: Path, tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    stock = build("llama")
    model, config = type(stock).__name__, type(stock.config).__name__
    code = f"open({str(witness)!r}, 'w')\nfrom transformers import {model}, {config}\n"
    code += f"class OwnConfig({config}):\n    model_type = 'own'\n"
    code += f"class OwnModel({model}):\n    config_class = OwnConfig\n"
    (folder / "own.py").write_text(code)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_config(folder, auto_map=auto_map)
    assert type(load(folder).model) is type(build("llama"))  # a stock class of that name serves
    assert not witness.exists()
    edit_config(folder, architectures=["OwnModel"], model_type="own")
    refused(folder, "trust_remote_code")
    assert not witness.exists()
    assert type(load(folder, trust_remote_code=True).model).__name__ == "OwnModel"
    assert witness.exists()


def test_an_unknown_architecture_is_named(folder: Path) -> None:
    edit_config(folder, model_type="martian", architectures=["MartianForCausalLM"])
    refused(folder, "config.json", "martian")


@pytest.mark.parametrize("changes", [{"architectures": "Model"}, {"architectures": [3]}, {"auto_map": ["own.py"]}])
def test_a_config_of_the_wrong_form_is_named(folder: Path, changes: dict[str, object]) -> None:
    edit_config(folder, **changes)
    refused(folder, "config.json", "list of names")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_hidden_layers": "x"}, "num_hidden_layers"),
        ({"hidden_size": 37}, "37"),
        ({"dtype": "int8"}, "int8"),
        ({"dtype": 5}, "5"),
        ({"dtype": "made_up"}, "made_up"),
    ],
)
def test_a_value_that_transformers_refuses_is_one_line(folder: Path, changes: dict[str, object], word: str) -> None:
    edit_config(folder, **changes)
    for read in (load, skeleton):
        with pytest.raises(InputError, match=rf"config\.json cannot be understood: .*{word}") as caught:
            read(folder)
        assert "\n" not in str(caught.value)


def test_the_class_falls_back_to_the_causal_one(folder: Path) -> None:
    edit_config(folder, architectures=None)
    assert type(load(folder).model) is type(build("llama"))


def test_a_broken_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    refused(folder, "tokenizer")


@pytest.mark.parametrize(("content", "word"), [(None, "no config.json"), ("{", "JSON"), ("[1]", "not a JSON object")])
def test_a_folder_needs_a_config(folder: Path, content: str | None, word: str) -> None:
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    refused(folder, "config.json", word)


def test_other_bad_sources(tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path / "none", "does not exist", "hub id")
    refused("", "model '' does not exist")
    refused(tmp_path / "none.gguf", "none.gguf", "does not exist")
    refused(tiny_lm / "config.json", "is a file")
    refused(tiny_lm, "int8", dtype="int8")
    refused(tiny_lm, "float99", dtype="float99")
    refused(tiny_lm, "device warp cannot be used", device="warp")


@pytest.mark.parametrize("failure", ["LocalEntryNotFoundError", "OfflineModeIsEnabled"])
def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    from huggingface_hub import errors

    def offline(*_: object, **__: object) -> None:
        raise getattr(errors, failure)("no network\nsecond line")

    monkeypatch.setattr("billhook.models.hub.snapshot_download", offline)
    refused("owner/name", "owner/name", "hub cannot be reached")


def test_hub_ids_load_like_folders(tiny_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(name: str, *, allow_patterns: list[str], ignore_patterns: object = None) -> str:
        assert name == "owner/name"
        asked.extend(allow_patterns)
        return str(tiny_lm)

    monkeypatch.setattr("billhook.models.hub.snapshot_download", download)
    loaded = load("owner/name")
    assert loaded.source == "owner/name" and loaded.folder == tiny_lm
    assert "*.py" not in asked and {"*.json", "adapter/adapter_model.safetensors"} <= set(asked)
