"""How one method is carried out in a comparison."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from billhook.data import Windows
from billhook.plan.address import Address
from billhook.plan.record import SearchRecord
from billhook.recipes.catalogue import load
from billhook.recipes.entries import _acted
from billhook.recipes.find import Choice
from billhook.recipes.opened import opened
from billhook.search import Found


@pytest.mark.parametrize("act", ["drop", "average"])
def test_what_is_judged_is_what_the_act_makes(act: str, tiny_lm: Path) -> None:
    model = opened(tiny_lm, dtype=None, device="cpu", trust_remote_code=False)
    text = Windows.of(torch.arange(40).reshape(2, 20), "test")
    record = SearchRecord(recipe="x", objective="none", steps=(), work=0, evaluations=0)
    choice = Choice(Found(frozenset({Address("decoder", 2)}), (), 0, 0), record, {})
    way = load("checkfree").model_copy(update={"act": act})
    made = _acted(way, model, choice, text, None)
    mixed = [p for p in made.parameters() if all(p is not q for q in model.model.parameters())]
    assert bool(mixed) == (act == "average")
    assert len(made.model.layers) == 4
