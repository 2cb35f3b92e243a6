"""One checkpoint, one fingerprint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import build
from torch import nn

from billhook.models import fingerprint, load, save


def test_it_repeats_and_does_not_depend_on_dtype(tiny_lm: Path) -> None:
    first = fingerprint(load(tiny_lm).model)
    assert len(first) == 64
    assert first == fingerprint(load(tiny_lm).model)
    assert first == fingerprint(load(tiny_lm, dtype="bfloat16").model)


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5", "clip"])
def test_it_survives_saving(name: str, tmp_path: Path) -> None:
    model = build(name)
    save(model, None, tmp_path)
    assert fingerprint(load(tmp_path).model) == fingerprint(model)


def test_any_change_of_weights_shows(tiny_lm: Path) -> None:
    model = load(tiny_lm).model
    before = fingerprint(model)
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    assert fingerprint(model) != before


def test_names_and_shapes_count() -> None:
    class One(nn.Module):
        def __init__(self, name: str, shape: tuple[int, ...]) -> None:
            super().__init__()
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))

    prints = {fingerprint(One(name, shape)) for name in ("a", "b") for shape in ((2, 3), (3, 2), (6,))}
    assert len(prints) == 6


def test_experts_are_skipped_since_files_fuse_them() -> None:
    model = build("mixtral")
    before = fingerprint(model)
    touched = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.add_(1)
                touched += 1
    assert touched and fingerprint(model) == before


@torch.no_grad()
def test_the_first_and_the_last_value_of_a_large_tensor_count() -> None:
    model = nn.Linear(1000, 3)
    seen = {fingerprint(model)}
    for place in (0, -1):
        model.weight.view(-1)[place] += 1
        seen.add(fingerprint(model))
    assert len(seen) == 3
