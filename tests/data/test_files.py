"""Reading text, and refusing what is not text in one clear line."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billhook.data import Text
from billhook.data.builtin import builtin, docstrings
from billhook.data.source import read
from billhook.plan.errors import InputError


def refused(source: object, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        read(source)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def gz(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()))
    return path


def test_text_is_taken_byte_for_byte(tmp_path: Path) -> None:
    text = " \n = Title = \r\n\n Käse \u2028 and more\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read(tmp_path / "a.txt").content == text
    assert read(str(gz(tmp_path / "b.txt.gz", text))).content == text
    assert read(tmp_path / "b.txt.gz").name == "b.txt.gz"


def test_jsonl_takes_the_field_text_or_all_strings(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "one", "url": "x"}, {"q": "two", "n": 3, "a": "three"}]
    lines = "\n".join(map(json.dumps, rows)) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    assert read(tmp_path / "a.jsonl").parts == ("one\n\n", "two\nthree\n\n")
    assert read(gz(tmp_path / "b.jsonl.gz", lines)).parts == ("one\n\n", "two\nthree\n\n")


def test_a_folder_is_all_its_text_in_order_of_name(tmp_path: Path) -> None:
    gz(tmp_path / "b.txt.gz", "second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.bin").write_bytes(b"\x00")
    (tmp_path / "d.jsonl").write_text('{"text": "third"}\n')
    assert read(tmp_path).content == "first\nsecond\nthird\n\n"


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\t\n", "empty"),
        ("a.txt", b"\xff\xfe\x00binary", "not UTF-8"),
        ("a.txt", b"text\x00text", "binary"),
        ("a.txt.gz", b"no gzip at all", "not a whole gzip"),
        ("a.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:-20], "not a whole gzip"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("a.jsonl", b'{"n": 1}\n', "neither a field text"),
        ("a.parquet", b"PAR1", "not of a kind"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, word: str) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, name, word)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "none.txt", "none.txt", "does not exist")
    refused("no such thing", "does not exist", "builtin")
    refused("", "text '' does not exist")
    refused(tmp_path, "holds no text files")


def test_a_hub_data_set_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("owner/texts", "owner/texts", "billhook[hub]")


def hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[Any]:
    asked = []

    def load_dataset(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        if isinstance(answer, Exception):
            raise answer
        return iter(answer)

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_hub_data_set_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, ({"text": f"row {i} " + "x" * 1000} for i in range(10**9)))
    text = read("owner/texts:small")
    assert text.parts[0].startswith("row 0") and 4_000_000 < len(text.content) < 5_000_000
    assert asked == [(("owner/texts", "small"), {"split": "train", "streaming": True})]


def test_an_unreadable_hub_data_set_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, ConnectionError("no route\nto host"))
    refused("owner/texts", "owner/texts", "no route")


@pytest.mark.parametrize("text", [builtin, docstrings])
def test_the_texts_that_python_ships_are_prose(text: Any) -> None:
    parts = text().parts
    assert len(text().content) > 100_000
    assert len(set(parts)) == len(parts)  # topics quote each other
    assert not any("::=" in part or ">>>" in part or "+---" in part for part in parts)
    assert text() == text()


@given(st.lists(st.text(min_size=1, max_size=30), min_size=2, max_size=40))
def test_front_and_back_are_the_whole_text_once(parts: list[str]) -> None:
    text = Text("t", tuple(parts))
    front, back = text.split()
    assert front.parts + back.parts == text.parts
    assert front.parts and back.parts
    longest = max(map(len, parts))
    assert abs(len(front.content) - 0.8 * len(text.content)) <= longest


def test_a_text_of_one_line_is_cut_between_words() -> None:
    front, back = Text("t", ("alpha beta gamma delta epsilon",)).split()
    assert (front.content + back.content).split() == ["alpha", "beta", "gamma", "delta", "epsilon"]
    with pytest.raises(InputError, match="too short"):
        Text("t", ("word",)).split()
