"""The recipe that flattens pairs: which pairs, where it does not apply, and what people are told."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import build

from billhook.models import load
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.record import Run
from billhook.recipes import compress as walk
from billhook.recipes.catalogue import load as recipe
from billhook.recipes.flattening import paired
from billhook.recipes.opened import opened
from billhook.report.card import card
from billhook.report.cuts import summary


def test_no_block_is_in_two_pairs(tiny_lm: Path) -> None:
    """Of five blocks, the last has none behind it; 1 is lowest and takes its neighbours with it."""
    model = opened(tiny_lm, dtype=None, device="cpu", trust_remote_code=False)
    scores = {Address("decoder", block): score for block, score in enumerate((0.2, 0.1, 0.3, 0.4, 0.0))}
    assert [unit.block for unit in paired(scores, model)] == [1, 3]
    assert [unit.block for unit in paired({u: -s for u, s in scores.items()}, model)] == [3, 0]


def test_a_model_without_such_pairs_is_refused_before_anything_is_measured(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*rest: object, **settings: object) -> None:
        raise AssertionError("the text was read")

    folder = tmp_path / "qwen3"
    model = build("qwen3")
    model.resize_token_embeddings(load(tiny_lm).model.config.vocab_size)
    model.config.max_position_embeddings = 512
    model.save_pretrained(folder)
    for file in tiny_lm.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(walk, "calibration_text", never)
    with pytest.raises(
        InputError, match=r"flatten-gpt finds no two blocks that can become one: .*its own self_attn\.q_norm"
    ):
        walk.compress(folder, budget="blocks=0.8", out=tmp_path / "out", recipe="flatten-gpt")


def test_the_report_says_what_became_of_which_block(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("billhook.recipes.texts.HEALING_TOKENS", 1024)
    monkeypatch.setattr("billhook.recipes.texts.CALIBRATION_TOKENS", 512)
    monkeypatch.setattr(walk, "judged_on", lambda *rest, **more: [])
    monkeypatch.setattr(walk, "proven", lambda run, *rest: run)
    walk.compress(tiny_lm, budget="blocks=0.6", out=tmp_path / "out", recipe="flatten-gpt")
    run = Run.model_validate_json((tmp_path / "out" / "billhook.json").read_text())
    gone = sorted(edit.unit.block for edit in run.plan.edits)
    assert len(gone) == 2 and gone[1] - gone[0] > 1
    line = dict(summary(run))["blocks flattened into another"]
    assert run.healing is not None
    groups = {graft.source: graft.groups for graft in run.healing.grafts}
    neurons = {graft.source: graft.neurons for graft in run.healing.grafts}
    for block, told in zip(gone, line.split("), "), strict=True):
        heads, inner = groups[f"decoder.{block}.attention"], neurons[f"decoder.{block}.mlp"]
        plurals = ["" if n == 1 else "s" for n in (heads, inner)]
        expected = f"{block} into {block + 1} ({heads} KV group{plurals[0]} and {inner} neuron{plurals[1]} of it stay"
        assert told.removesuffix(")") == expected
    assert line.replace("(", "")[:9] in card(run).replace("\\", "").replace("(", "")


def test_the_recipe_is_as_it_says() -> None:
    found = recipe("flatten-gpt")
    assert (found.unit, found.act, found.heal, found.choice.word) == ("block", "flatten", "none", "one-shot")
