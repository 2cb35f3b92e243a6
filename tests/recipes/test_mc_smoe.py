"""Merging and then taking apart, all the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import billhook
from billhook.anatomy import discover
from billhook.measure.cost import cost
from billhook.plan.errors import InputError
from billhook.recipes import heal as heal_walk
from billhook.recipes.apply import apply
from billhook.recipes.catalogue import load
from billhook.recipes.schema import Recipe


def test_all_the_way(tiny_mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is what the record says, loads in plain transformers, and is not healed, cut on disk or made for an
    engine that cannot have it."""
    monkeypatch.setattr("billhook.recipes.texts.HEALING_TOKENS", 4096)
    out = tmp_path / "out"
    run = billhook.compress(tiny_mixture, budget="params=0.6", out=out, recipe="mc-smoe", max_new_tokens=2)
    assert run.plan.factors and run.plan.keeps and 0.5 < run.realised["params"] <= 0.6
    assert run.search.steps[-1].realised["params"] == pytest.approx(run.realised["params"])
    assert run.healing is not None and run.healing.method == "merge"
    rank = run.plan.factors[0].rank
    for name in ("README.md", "report.html"):
        assert f"{rank} of 48 whole, the others of rank {rank}" in (out / name).read_text(encoding="utf-8")
    small = billhook.load(out, dtype="float32").model
    assert cost(discover(small).outline)["params"] == run.costs["params"].compressed
    stock = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=True)
    ids = torch.tensor([[5, 9, 33, 12]])
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, small(ids).logits)

    with pytest.raises(InputError, match="experts in two parts cannot be healed"):
        heal_walk.heal(out, out=tmp_path / "healed", method="closed-form")
    with pytest.raises(InputError, match="on a loaded model"):
        apply(tiny_mixture, out, out=tmp_path / "applied")
    with pytest.raises(InputError, match="target uniform cannot carry experts in two parts"):
        billhook.compress(tiny_mixture, budget="params=0.6", out=tmp_path / "no", recipe="mc-smoe", target="uniform")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["out"]


def test_only_merged_experts_are_taken_apart() -> None:
    words = load("mc-smoe").model_dump()
    with pytest.raises(ValueError, match="only merged experts are taken apart"):
        Recipe.model_validate({**words, "act": "drop"})
    assert load("mc-smoe").aim == "remote" and load("m-smoe").aim == "uniform"
