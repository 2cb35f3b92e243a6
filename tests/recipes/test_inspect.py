"""What is said of models of every kind, those that text alone does not reach included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build, randomise

from billhook.data import Windows
from billhook.measure.batches import batches_of
from billhook.recipes.inspect import inspect


def folder_of(name: str, tokenizer: Any, place: Path) -> Path:
    model = build(name)
    if model.main_input_name != "pixel_values":
        part = model.text_model if name == "clip" else model
        part.resize_token_embeddings(len(tokenizer))
        if name == "clip":
            model.config.text_config.vocab_size = len(tokenizer)
        tokenizer.save_pretrained(place)
    randomise(model)
    model.save_pretrained(place)
    return place


@pytest.mark.parametrize("name", ["bert", "t5", "bart", "gemma3_image", "whisper", "clip", "vit"])
def test_every_kind_is_described_and_measured_where_text_reaches_it(
    name: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    run = inspect(folder_of(name, tiny_tokenizer, tmp_path / "model"))
    assert {stack.name: len(stack.blocks) for stack in run.outline.stacks} == FAMILIES[name].stacks
    if name in ("whisper", "clip", "vit"):
        assert run.measures is None
        return
    assert run.measures is not None
    reached = set(FAMILIES[name].stacks) - {"vision"}
    assert set(run.measures.angular) == reached
    blocks = {address.partition(".")[0] for address in run.measures.scores["block-influence, blocks"]}
    assert blocks == reached


def test_an_encoder_decoder_is_audited_too(tiny_tokenizer: Any, tmp_path: Path) -> None:
    run = inspect(folder_of("t5", tiny_tokenizer, tmp_path / "model"), out=tmp_path / "out")
    assert set(run.audits) == {"encoder", "decoder"}
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_decoder_of_a_pair_reads_what_it_is_trained_to_read() -> None:
    model = build("t5")
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    (batch,) = batches_of(Windows.of(ids, "text"), model)
    assert batch["input_ids"].tolist() == ids.tolist()
    assert batch["decoder_input_ids"].tolist() == [[0, 5, 6], [0, 8, 9]]
