"""A GGUF file becomes an ordinary model: same logits, same tokens, and it can be saved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from billhook.models import load, save
from billhook.plan.errors import InputError

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BILLHOOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF stores the two halves of each rotary head woven together."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, loaded: Any, kind: GGMLQuantizationType, head: np.ndarray | None = None) -> Path:
    """The tiny model as a GGUF file, its matrices stored as ``kind``; ``head`` is an output matrix of its own."""
    model, config = loaded.model, loaded.model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(loaded.tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_token_types([3, 3, 3] + [1] * (len(bpe["vocab"]) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name: str, value: np.ndarray) -> None:
        stored = GGMLQuantizationType.F32 if value.ndim == 1 else kind
        writer.add_tensor(name, gguf.quants.quantize(value, stored), raw_dtype=stored)

    state = {name: tensor.detach().float().numpy() for name, tensor in model.named_parameters()}
    add("token_embd.weight", state["model.embed_tokens.weight"])
    add("output_norm.weight", state["model.norm.weight"])
    for i in range(config.num_hidden_layers):
        for ours, theirs in _NAMES.items():
            value = state[f"model.layers.{i}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if theirs == "attn_q" else config.num_key_value_heads
                value = interleaved(value, heads)
            add(f"blk.{i}.{theirs}.weight", np.ascontiguousarray(value))
    if head is not None:
        add("output.weight", head)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(3, 15)[None]).logits


def test_a_gguf_file_is_the_model_it_was_made_from(tiny_lm: Path, tmp_path: Path, own_cache: Path) -> None:
    original = load(tiny_lm)
    path = write_gguf(tmp_path / "tiny.gguf", original, GGMLQuantizationType.F32)
    loaded = load(path)
    assert loaded.model.dtype == torch.float32
    assert torch.equal(logits(loaded.model), logits(original.model))
    text = "Two words, and a third."
    assert loaded.tokenizer(text, add_special_tokens=False).input_ids == original.tokenizer(text).input_ids
    assert loaded.folder.parent == own_cache
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


def test_it_can_be_saved_and_is_no_longer_quantised(tiny_lm: Path, tmp_path: Path) -> None:
    loaded = load(write_gguf(tmp_path / "tiny.gguf", load(tiny_lm), GGMLQuantizationType.F16))
    assert loaded.model.dtype == torch.float16
    out = tmp_path / "out"
    out.mkdir()
    save(loaded.model, loaded.tokenizer, out, loaded.folder)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert torch.equal(logits(load(out).model), logits(loaded.model))


def test_quantised_blocks_are_unpacked_to_bfloat16(tiny_lm: Path, tmp_path: Path) -> None:
    narrow = load(tiny_lm)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = type(narrow.model.config).from_dict(narrow.model.config.to_dict() | sizes | {"head_dim": 16})
    model = type(narrow.model)(config).eval()  # every width in whole blocks of 32 values
    wide = replace(narrow, model=model)
    loaded = load(write_gguf(tmp_path / "wide.gguf", wide, GGMLQuantizationType.Q8_0))
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    for (name, before), after in zip(model.named_parameters(), loaded.model.parameters(), strict=True):
        error = (before - after.float()).abs().max() / before.abs().max()
        assert error < 0.01, name


def test_an_output_matrix_of_its_own_stays_untied(tiny_lm: Path, tmp_path: Path) -> None:
    original = load(tiny_lm)
    head = 2 * original.model.lm_head.weight.detach().numpy()
    loaded = load(write_gguf(tmp_path / "tiny.gguf", original, GGMLQuantizationType.F32, head))
    assert loaded.model.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(loaded.model), 2 * logits(original.model))


def test_converting_is_done_once(tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", load(tiny_lm), GGMLQuantizationType.F32)
    first = load(path)
    monkeypatch.setattr("billhook.models.gguf.convert", lambda *_: pytest.fail("converted again"))
    moved = path.rename(tmp_path / "other-name.gguf")
    assert load(moved).folder == first.folder


def test_nothing_is_printed(tiny_lm: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", load(tiny_lm), GGMLQuantizationType.F32)
    capfd.readouterr()
    load(path)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def refused(path: Path, word: str) -> None:
    with pytest.raises(InputError, match=word) as caught:
        load(path)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


def test_damaged_files_are_named(tiny_lm: Path, tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    refused(tmp_path / "text.gguf", "not a GGUF file")
    (tmp_path / "empty.gguf").write_bytes(b"")
    refused(tmp_path / "empty.gguf", "not a GGUF file")
    whole = write_gguf(tmp_path / "tiny.gguf", load(tiny_lm), GGMLQuantizationType.F32).read_bytes()
    for part in (40, len(whole) // 3, len(whole) - 5000):
        (tmp_path / "cut.gguf").write_bytes(whole[:part])
        refused(tmp_path / "cut.gguf", "cannot be read")
    assert not any(path.is_dir() for path in own_cache.iterdir())
