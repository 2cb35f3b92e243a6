"""The DeciLM form: what its loaders read is true, and transformers gives the same model."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import NO_END, VOCABULARY, randomise, tokens
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from billhook import export
from billhook.anatomy import discover
from billhook.models import building
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Keep, Plan
from billhook.plan.target import Target
from billhook.surgery import apply
from billhook.surgery.reopen import load

UNITS = ["decoder.1", "decoder.0.mlp", "decoder.2.attention", "decoder.3.mlp", "decoder.4.attention"]
PLAN = Plan.of(UNITS, Target.DECI)
WIDTHS = {2: tuple(range(0, 40, 3)), 4: tuple(range(9))}
NARROW = Plan.of(
    UNITS,
    Target.DECI,
    [Keep(unit=Address("decoder", i, "mlp"), inner="neuron", indices=kept) for i, kept in WIDTHS.items()],
)


def model_of(kind: type, **settings: Any) -> PreTrainedModel:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 256, "num_hidden_layers": 5}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = AutoModelForCausalLM.from_config(kind(**sizes | heads | NO_END | settings))
    randomise(model)
    return model.eval()


def saved(model: PreTrainedModel, out: Path, plan: Plan = PLAN) -> PreTrainedModel:
    anatomy = discover(model)
    applied = apply(model, anatomy, plan)
    with building(out) as folder:
        export.save(applied, anatomy, plan, folder)
    return applied


def greedy(model: PreTrainedModel, **settings: Any) -> Tensor:
    return model.generate(**tokens(model, 2, None), max_new_tokens=8, do_sample=False, **settings)


MODELS = {
    "llama": lambda: model_of(LlamaConfig, tie_word_embeddings=True),
    "llama_bias": lambda: model_of(LlamaConfig, attention_bias=True, num_key_value_heads=1),
    "qwen2": lambda: model_of(Qwen2Config, intermediate_size=48),
}


@pytest.mark.parametrize("plan", [PLAN, NARROW], ids=["dropped", "narrow"])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_and_billhook_give_the_same_model(name: str, plan: Plan, tmp_path: Path) -> None:
    applied = saved(MODELS[name](), tmp_path / "out", plan)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        for other in (model, load(tmp_path / "out").model):
            inputs = tokens(applied, 3, "left")
            torch.testing.assert_close(other(**inputs).logits, applied(**inputs).logits, atol=1e-5, rtol=0)
            assert torch.equal(greedy(other), greedy(applied))
            assert torch.equal(greedy(other, use_cache=False), greedy(applied))
    assert type(load(tmp_path / "out").model) is type(applied)


@pytest.mark.parametrize("plan", [PLAN, NARROW], ids=["dropped", "narrow"])
@pytest.mark.parametrize("name", MODELS)
def test_what_vllm_reads_fits_the_tensors(name: str, plan: Plan, tmp_path: Path) -> None:
    """The attributes that vLLM's nemotron_nas.py and its model_arch_config_convertor.py read, with dots."""
    saved(MODELS[name](), tmp_path / "out", plan)
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert config.architectures == ["DeciLMForCausalLM"] and config.model_type == "nemotron-nas"
    assert len(config.block_configs) == config.num_hidden_layers == 4
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for i, block in enumerate(config.block_configs):
        own = {key.removeprefix(f"model.layers.{i}."): t for key, t in tensors.items() if f"layers.{i}." in key}
        assert block.attention.no_op == ("self_attn.q_proj.weight" not in own) == ("input_layernorm.weight" not in own)
        assert block.ffn.no_op == ("mlp.up_proj.weight" not in own) == ("post_attention_layernorm.weight" not in own)
        if not block.attention.no_op:
            kv_heads = config.num_attention_heads // block.attention.n_heads_in_group
            assert own["self_attn.k_proj.weight"].shape[0] == kv_heads * head_dim
            assert config.qkv_bias == ("self_attn.k_proj.bias" in own)
            assert config.attention_bias == ("self_attn.o_proj.bias" in own)
        if not block.ffn.no_op:
            width = block.ffn.intermediate_size
            if hasattr(block.ffn, "ffn_mult"):
                width = -(-int(2 * block.ffn.ffn_mult * config.hidden_size / 3) // 256) * 256
            assert own["mlp.up_proj.weight"].shape[0] == width
    for attribute in ("hidden_act", "rms_norm_eps", "vocab_size", "tie_word_embeddings", "rope_parameters"):
        assert hasattr(config, attribute)
    again = pickle.loads(pickle.dumps(config))  # vLLM hands it to its workers
    assert again.block_configs[0].attention.n_heads_in_group == config.block_configs[0].attention.n_heads_in_group
    assert json.loads(config.to_json_string())["block_configs"] == config.block_configs


def test_narrow_mlps_have_their_width_in_block_configs(tmp_path: Path) -> None:
    saved(MODELS["llama"](), tmp_path / "out", NARROW)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    blocks = [block["ffn"]["intermediate_size"] for block in config["block_configs"]]
    assert blocks == [None, 14, None, 9]
    assert config["intermediate_size"] == 256 and not [key for key in config if "per_layer" in key]


def test_what_llama_cpp_reads_fits_the_tensors(tmp_path: Path) -> None:
    """The keys of the JSON that llama.cpp's converter reads, all of which must be there."""
    saved(MODELS["llama"](), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for i, block in enumerate(config["block_configs"]):
        assert block["attention"]["replace_with_linear"] is False
        attends = block["attention"]["n_heads_in_group"] is not None
        assert attends == (f"model.layers.{i}.self_attn.q_proj.weight" in tensors)
        multiplier = block["ffn"]["ffn_mult"]
        width = -(-int(2 * (multiplier or 0.0) * config["hidden_size"] / 3) // 256) * 256
        stored = tensors.get(f"model.layers.{i}.mlp.up_proj.weight")
        assert width == (0 if stored is None else stored.shape[0])
        assert multiplier is None or isinstance(multiplier, float)
    needed = ("vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings", "rms_norm_eps")
    assert not [key for key in needed if key not in config]


def test_a_width_that_llama_cpp_cannot_say_stops_its_converter(tmp_path: Path) -> None:
    saved(model_of(LlamaConfig, intermediate_size=300), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ["ffn_mult" in block["ffn"] for block in config["block_configs"]] == [True, False, True, False]


def test_the_code_is_short_and_builds_on_the_installed_class(tmp_path: Path) -> None:
    saved(MODELS["qwen2"](), tmp_path / "out")
    texts = [path.read_text() for path in sorted((tmp_path / "out").glob("*_decilm.py"))]
    assert [re.findall(r"^class DeciLM\w*\((.*)\)", text, re.M) for text in texts] == [
        ["Qwen2Config"],
        ["transformers.Qwen2ForCausalLM"],
    ]
    assert sum(bool(line.strip()) for text in texts for line in text.splitlines()) < 100


def test_a_second_cut(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    saved(model, tmp_path / "first", Plan.of(["decoder.1", "decoder.2.attention"], Target.DECI))
    second = Plan.of(["decoder.0.mlp", "decoder.2"], Target.DECI)
    export.save_checkpoint(tmp_path / "first", second, tmp_path / "second")
    expected = apply(
        model, discover(model), Plan.of(["decoder.1", "decoder.3", "decoder.2.attention", "decoder.0.mlp"])
    )
    again = load(tmp_path / "second").model
    with torch.no_grad():
        assert torch.equal(greedy(again), greedy(expected))


WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}


@pytest.mark.parametrize(
    ("model", "unit", "message"),
    [
        (lambda: MODELS["llama"](), "decoder.0.attention", "first block that is left has no attention"),
        (lambda: model_of(LlamaConfig, mlp_bias=True), "decoder.1.mlp", "no biases in its MLPs"),
        (lambda: model_of(Qwen2Config, **WINDOW), "decoder.1.mlp", "sliding window"),
    ],
)
def test_what_a_decilm_loader_would_get_wrong_is_refused(model: Any, unit: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        saved(model(), tmp_path / "out", Plan.of([unit], Target.DECI))
    assert not (tmp_path / "out").exists()


def test_a_form_that_is_not_billhooks_is_refused(tmp_path: Path) -> None:
    saved(MODELS["llama"](), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    content = json.loads(path.read_text())
    del content["block_configs"]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="not in the DeciLM form"):
        load(tmp_path / "out")
