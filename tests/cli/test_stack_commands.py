"""The commands for one file of every size, for real, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from terminal import billhook
from transformers import AutoModelForCausalLM

import billhook as package


@pytest.fixture(scope="module")
def stacked(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("stacked") / "stack"
    result = billhook("stack", tiny_lm, "--out", out, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    content: dict[str, Any] = json.loads(result.stdout)
    assert content["paths"]["out"] == str(out)
    return out, content["sizes"]


def test_a_stack_says_how_much_it_takes(stacked: tuple[Path, dict[str, Any]]) -> None:
    out, sizes = stacked
    rest, blocks = ((out / name).stat().st_size for name in ("rest.safetensors", "blocks.bin"))
    assert sizes == {"always": rest, "read": rest + blocks, "whole": rest + blocks}


@torch.no_grad()
def test_more_of_it_is_nearer_to_the_model(stacked: tuple[Path, dict[str, Any]], tiny_lm: Path, tmp_path: Path) -> None:
    folder, sizes = stacked
    text = torch.arange(3, 15)[None]
    dense = package.load(tiny_lm).model(text).logits
    half = (sizes["always"] + sizes["whole"]) // 2
    off = []
    for number, budget in enumerate((f"size={half}B", f"size={half / sizes['whole']}", f"size={sizes['whole']}B")):
        out = tmp_path / str(number)
        result = billhook("unstack", folder, "--budget", budget, "--out", out, "--json")
        assert result.exit_code == 0, (result.output, result.exception)
        found = json.loads(result.stdout)["sizes"]
        assert sizes["always"] < found["read"] <= (half if number < 2 else sizes["whole"])
        off.append(float((AutoModelForCausalLM.from_pretrained(out)(text).logits - dense).square().mean()))
    assert off[0] == pytest.approx(off[1], rel=0.1)
    assert off[2] < 0.5 * off[0]
    assert billhook("generate", tmp_path / "2", "Why?", "--max-new-tokens", 2).exit_code == 0


def test_what_people_read(stacked: tuple[Path, dict[str, Any]], tiny_lm: Path, tmp_path: Path) -> None:
    shown = billhook("unstack", stacked[0], "--budget", "size=1.5GB", "--out", tmp_path / "out").stdout
    assert "an ordinary checkpoint" in shown and len(shown.splitlines()) == 1
    shown = billhook("stack", tiny_lm, "--out", tmp_path / "stack", "--calibration", "builtin").stdout
    assert "needed at any size" in shown and len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    ("folder", "budget", "reason"),
    [
        ("stack", "params=0.5", "read up to a size alone"),
        ("stack", "size=0.5,params=0.5", "read up to a size alone"),
        ("stack", "until=cliff", "read up to a size alone"),
        ("stack", "size=10B", "10 bytes are too few"),
        ("stack", "much", "not of the form KIND=AMOUNT"),
        ("model", "size=0.5", "holds no stack"),
        ("nowhere", "size=0.5", "holds no stack"),
    ],
)
def test_bad_input_is_one_line(
    stacked: tuple[Path, dict[str, Any]], tiny_lm: Path, tmp_path: Path, folder: str, budget: str, reason: str
) -> None:
    place = {"stack": stacked[0], "model": tiny_lm, "nowhere": tmp_path / "nowhere"}[folder]
    result = billhook("unstack", place, "--budget", budget, "--out", tmp_path / "out")
    assert result.exit_code == 2 and reason in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten(stacked: tuple[Path, dict[str, Any]], tiny_lm: Path) -> None:
    folder, _ = stacked
    for command in (["stack", tiny_lm], ["unstack", folder, "--budget", "size=0.9"]):
        result = billhook(*command, "--out", folder)
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert (folder / "stack.json").is_file()


def test_what_is_computed_in_float32_is_stored_as_it_was(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = package.load(tiny_lm, dtype="bfloat16")
    loaded.model.save_pretrained(tmp_path / "half")
    loaded.tokenizer.save_pretrained(tmp_path / "half")
    monkeypatch.setattr("billhook.recipes.opened.emulated", lambda _: True)
    assert billhook("stack", tmp_path / "half", "--out", tmp_path / "stack").exit_code == 0
    assert billhook("unstack", tmp_path / "stack", "--budget", "size=0.9", "--out", tmp_path / "out").exit_code == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
