"""What is said of models of every kind, those that text alone does not reach included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build, randomise

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.measure.batches import batches_of
from billhook.plan.plan import Plan
from billhook.plan.record import COMPLEXITY, Measures, Run
from billhook.recipes.inspect import inspect
from billhook.report.figures import complexity_sentence


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
    assert run.measures is not None
    found = run.measures.scores["feature complexity"]
    assert set(found) == {f"{stack}.{i}.mlp" for stack, count in FAMILIES["t5"].stacks.items() for i in range(count)}
    assert "Feature complexity: " in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_what_neurons_have_in_common_is_said() -> None:
    run = Run(outline=discover(build("llama")).outline, plan=Plan(), model="m", costs={}, environment={})

    def said(shares: dict[str, float]) -> str:
        return complexity_sentence(run.model_copy(update={"measures": Measures(scores={COMPLEXITY: shares})}))

    assert complexity_sentence(run) == said({}) == ""
    assert "no two neurons" in said({"decoder.0.mlp": 1.0})
    some = said({"decoder.0.mlp": 1.0, "decoder.10.mlp": 0.8, "decoder.9.mlp": 0.8})
    assert "leaves 86.7% of an MLP on average, least in decoder.9.mlp (80.0%)." in some and "half" not in some
    assert said({"decoder.0.mlp": 0.5}).endswith("No more than half are merged.")


def test_the_decoder_of_a_pair_reads_what_it_is_trained_to_read() -> None:
    model = build("t5")
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    (batch,) = batches_of(Windows.of(ids, "text"), model)
    assert batch["input_ids"].tolist() == ids.tolist()
    assert batch["decoder_input_ids"].tolist() == [[0, 5, 6], [0, 8, 9]]
