"""Recipes whose act combines blocks, from the YAML to a checkpoint that others load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from billhook.data import Windows
from billhook.models import load
from billhook.plan.errors import InputError
from billhook.plan.record import Run
from billhook.plan.target import Target
from billhook.recipes import compress as walk
from billhook.recipes.catalogue import load as recipe
from billhook.recipes.inspect import divided
from billhook.recipes.schema import Recipe
from billhook.recipes.words import explained
from billhook.report.loading import commands

NAMES = {"fusegpt": "fuse", "checkfree": "average", "flatten-gpt": "flatten", "branch-gains": "gains"}


def test_an_act_that_combines_is_checked() -> None:
    choice = {"word": "greedy"}
    good: dict[str, Any] = {"name": "mine", "title": "Mine", "unit": "block", "objective": "turn", "choice": choice}
    assert Recipe.model_validate({**good, "act": "fuse"}).act == "fuse"
    with pytest.raises(ValueError, match="combines whole blocks"):
        Recipe.model_validate({**good, "unit": "sublayer", "act": "average"})
    assert Recipe.model_validate({**good, "unit": "sublayer", "act": "gains"}).act == "gains"
    with pytest.raises(ValueError, match="goes with heal none"):
        Recipe.model_validate({**good, "act": "gains", "heal": "closed-form"})


@pytest.mark.parametrize(("name", "act"), NAMES.items())
def test_every_act_is_explained(name: str, act: str) -> None:
    assert explained(recipe(name))[f"act {act}"].endswith(".")


def test_a_way_to_heal_on_top_is_refused_at_once(tiny_lm: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"makes new weights itself \(act gains\); leave out --heal closed-form"):
        walk.compress(tiny_lm, budget="blocks=0.8", out=tmp_path / "out", recipe="branch-gains", heal="closed-form")


@pytest.mark.parametrize(("name", "act"), NAMES.items())
def test_compressed_with_an_act(
    name: str, act: str, tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder holds the new weights, the record says whose they are, and any engine loads it."""
    monkeypatch.setattr("billhook.recipes.texts.HEALING_TOKENS", 1024)
    monkeypatch.setattr("billhook.recipes.texts.CALIBRATION_TOKENS", 512)
    monkeypatch.setattr(walk, "judged_on", lambda *rest, **more: [])
    monkeypatch.setattr(walk, "proven", lambda run, *rest: run)
    out = tmp_path / "out"
    run = walk.compress(tiny_lm, budget="blocks=0.8", out=out, recipe=name)
    assert run.healing is not None and run.healing.method == act and run.healing.combined
    assert run.plan.target is Target.UNIFORM
    assert "--heal" not in commands(run) and f"--recipe {name}" in commands(run)
    assert Run.model_validate_json((out / "billhook.json").read_text()).healing == run.healing
    model = AutoModelForCausalLM.from_pretrained(out)
    assert len(model.model.layers) == 4
    dense = {name: tensor for name, tensor in load(tiny_lm).model.state_dict().items() if "layers" in name}
    old = {tensor.double().sum().item() for tensor in dense.values()}
    fresh = [n for n, t in model.state_dict().items() if "layers" in n and t.double().sum().item() not in old]
    learned = any(refit.taken for refit in run.healing.refits) if act == "fuse" else not run.healing.refused
    assert bool(fresh) == learned


def test_an_audit_divides_its_text() -> None:
    three = Windows.of(torch.arange(30).reshape(3, 10), "text")
    fit, held = divided(three)
    assert fit.ids.tolist() == three.ids[:2].tolist() and held.ids.tolist() == three.ids[2:].tolist()
    fit, held = divided(Windows.of(torch.arange(7)[None], "text"))
    assert fit.ids.tolist() == [[0, 1, 2]] and held.ids.tolist() == [[3, 4, 5]]
    with pytest.raises(InputError, match="two tokens at least; text has 1"):
        divided(Windows.of(torch.zeros(1, 1), "text"))
