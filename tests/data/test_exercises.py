"""Exercises stand among a text, are right, and none of them is a question that judges."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from billhook.data import Text, calibration, evaluation
from billhook.data.exercises import EVERY, exercises, with_exercises
from billhook.data.questions import PROBES, questions
from billhook.data.windows import Windows, first

TEXT = Text("words", tuple(f"line {n} says that {n % 7} is no {n % 5}.\n" for n in range(3000)))


@pytest.fixture(scope="module")
def tokenizer(tiny_lm: Path) -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(tiny_lm)


def test_none_is_a_question_that_judges() -> None:
    judged = {line for of_probe in questions().values() for one in of_probe for line in one.lines}
    written = exercises(100_000).content.splitlines()
    assert len(judged) > 150 and len(written) > 3000
    assert not judged & set(written)


def test_every_kind_is_practised_and_seeds_differ() -> None:
    text = exercises(20_000).content
    for sign in (" + ", " * ", " | ", ": ", ") ", "}"):
        assert sign in text
    assert exercises(20_000).content == text != exercises(20_000, seed=1).content
    assert len(PROBES) == 8


def test_an_eighth_of_the_windows(tokenizer: AutoTokenizer) -> None:
    plain = first(TEXT, tokenizer, tokens=20 * 32, length=32)
    mixed = with_exercises(plain, tokenizer)
    changed = [i for i in range(20) if not torch.equal(plain.ids[i], mixed.ids[i])]
    assert changed == [4, 12] and EVERY == 8
    assert mixed.ids.shape == plain.ids.shape and mixed.name == "words+exercises"


def test_fewer_windows_than_that_stay_as_they_are(tokenizer: AutoTokenizer) -> None:
    plain = Windows.of(torch.arange(96).reshape(3, 32), "x")
    assert torch.equal(with_exercises(plain, tokenizer).ids, plain.ids)


def test_named_as_a_source(tokenizer: AutoTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text(TEXT.content, encoding="utf-8")
    plain = calibration(str(path), tokenizer, tokens=8 * 32, length=32)
    mixed = calibration(f"{path}+exercises", tokenizer, tokens=8 * 32, length=32)
    assert torch.equal(mixed.ids, with_exercises(plain, tokenizer).ids)
    assert not torch.equal(mixed.ids, plain.ids)
    judged, other = (evaluation(source, tokenizer, tokens=64, length=32) for source in (str(path), f"{path}+exercises"))
    assert [w.fingerprint for _, w in judged] == [w.fingerprint for _, w in other]
