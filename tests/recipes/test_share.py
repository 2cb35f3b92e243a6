"""Blocks that run on with the weights of a neighbour: found, refused, and all the way to the folder."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from families import VOCABULARY, build

import billhook
from billhook.anatomy import discover
from billhook.data import Windows
from billhook.plan.address import Address
from billhook.plan.budget import Budget
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.record import Run, Step
from billhook.recipes import apply as apply_walk
from billhook.recipes import compare as side_by_side
from billhook.recipes import compress as walk
from billhook.recipes import entries
from billhook.recipes import heal as heal_walk
from billhook.recipes.catalogue import load
from billhook.recipes.schema import Recipe
from billhook.recipes.sharing import require_sharing
from billhook.recipes.words import explained
from billhook.report.loading import is_ordinary
from billhook.search import Found, share

WINDOWS = Windows.of(torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(2)), "noise")
MINE = {
    "name": "mine",
    "title": "Mine",
    "unit": "block",
    "score": {"word": "block-influence"},
    "choice": {"word": "one-shot"},
    "act": "share",
}


def found(*blocks: int) -> Found:
    steps = [Step(units=(f"decoder.{i}",), score=None, objective=None, realised={}, work=0) for i in blocks]
    return Found(frozenset(Address("decoder", i) for i in blocks), tuple(steps), 100, 1)


def copied(model: Any, new: int, first: int) -> None:
    model.model.layers[new].load_state_dict(model.model.layers[first].state_dict())


def test_a_copy_runs_with_the_weights_of_its_twin_and_a_silent_block_goes() -> None:
    model = build("llama")
    copied(model, 3, 2)
    with torch.no_grad():
        for linear in (model.model.layers[1].mlp.down_proj, model.model.layers[1].self_attn.o_proj):
            linear.weight.zero_()
    anatomy = discover(model)
    left, schedule = share(model, anatomy, found(1, 3), WINDOWS)
    assert left.drops == {Address("decoder", 1)}
    assert schedule is not None and schedule.order("decoder", 5) == [0, 2, 2, 4]
    assert left.evaluations == 1 + 5 and left.work == 100 + 2 * 5 * WINDOWS.tokens * 5
    left, schedule = share(model, anatomy, found(1), WINDOWS)
    assert (left.drops, schedule) == ({Address("decoder", 1)}, None)


def test_a_group_consists_of_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks 2 and 3 between 1 and 4: that the one runs with the weights of 4 and the other of 1 is never tried."""
    tried = []

    def divergences(model: Any, anatomy: Any, plan: Plan, *rest: Any) -> list[float]:
        order = plan.schedule.order("decoder", 5) if plan.schedule else [0, 1, 4]
        tried.append(order)
        return [-order.count(1) - 10.0 * (order != sorted(order))]

    monkeypatch.setattr(sys.modules[share.__module__], "divergences", divergences)
    model = build("llama")
    _, schedule = share(model, discover(model), found(2, 3), WINDOWS)
    assert schedule is not None and schedule.order("decoder", 5) == [0, 1, 1, 1, 4]
    assert tried == [[0, 1, 4], [0, 1, 1, 4], [0, 1, 4, 4], [0, 1, 1, 1, 4]]


@pytest.mark.parametrize(
    ("name", "budget", "reason"),
    [
        ("llama", "flops=0.8", "saves no flops"),
        ("llama", "params=0.8,kv_bytes=0.9", "saves no kv_bytes"),
        ("gpt2", "params=0.8", "transposed"),
        ("deepseek_v3", "size=0.8", "stored and no parameter"),
    ],
)
def test_refused_before_anything_begins(name: str, budget: str, reason: str) -> None:
    model = build(name)
    opened: Any = SimpleNamespace(model=model, anatomy=discover(model))
    with pytest.raises(InputError, match=reason):
        require_sharing(load("foldgpt"), opened, Budget.parse(budget))


def test_the_word_is_checked_and_explained() -> None:
    assert explained(load("foldgpt"))["act share"].endswith(".")
    assert Recipe.model_validate(MINE).act == "share"
    with pytest.raises(ValueError, match="cannot be healed"):
        Recipe.model_validate({**MINE, "heal": "closed-form"})
    with pytest.raises(ValueError, match="combines whole blocks"):
        Recipe.model_validate({**MINE, "unit": "mlp"})


@pytest.mark.parametrize("target", ["uniform", "deci"])
def test_targets_and_healing_are_refused(target: str, tiny_lm: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"budget": "params=0.8", "out": tmp_path / "out", "recipe": "foldgpt"}
    with pytest.raises(InputError, match=f"which target {target} cannot carry"):
        billhook.compress(tiny_lm, **given, target=target)
    with pytest.raises(InputError, match="share weights, which --heal closed-form would part again"):
        billhook.compress(tiny_lm, **given, heal="closed-form")


@pytest.fixture
def twins(tiny_lm: Path, tmp_path: Path) -> Path:
    """A model two blocks of which are the same."""
    loaded = billhook.load(tiny_lm)
    copied(loaded.model, 3, 2)
    loaded.model.save_pretrained(tmp_path / "twins")
    loaded.tokenizer.save_pretrained(tmp_path / "twins")
    return tmp_path / "twins"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billhook.recipes.texts.CALIBRATION_TOKENS", 512)
    monkeypatch.setattr(walk, "judged_on", lambda *rest, **more: [])
    monkeypatch.setattr(walk, "proven", lambda run, *rest: run)


def test_all_the_way(twins: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block that goes is made to be the copy; what is written reads well, and applies and cuts no more."""
    monkeypatch.setattr("billhook.recipes.find.scored", _third_least)
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(MINE))
    out = tmp_path / "out"
    run = billhook.compress(twins, budget="params=0.8", out=out, recipe=mine)
    assert run.plan.schedule is not None and run.plan.schedule.order("decoder", 5) == [0, 1, 2, 2, 4]
    assert run.plan.edits == () and not run.plan.empty
    assert run.realised["params"] == pytest.approx(0.8) and run.realised["flops"] == pytest.approx(1)
    assert run.costs["kv_bytes"].compressed == pytest.approx(run.costs["kv_bytes"].dense)
    assert Run.model_validate_json((out / "billhook.json").read_text()) == run
    page, card = ((out / name).read_text(encoding="utf-8") for name in ("report.html", "README.md"))
    assert "3 (of 2)" in page and "cell shared" in page and "with the weights of decoder.2" in page
    assert "- weight-sharing" in card and "depth-pruning" not in card and "trust_remote_code=True" in card
    assert not is_ordinary(run)
    text = torch.arange(3, 15)[None]
    dense, small = billhook.load(twins).model, billhook.load(out).model
    torch.testing.assert_close(small(text).logits, dense(text).logits)
    assert len(set(small.parameters())) < len(set(dense.parameters()))
    again = apply_walk.apply(twins, out, out=tmp_path / "again")
    assert again.costs["size"] == run.costs["size"]
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (out, tmp_path / "again", twins)]
    assert abs(sizes[0] - sizes[1]) < 256 and sizes[0] < 0.9 * sizes[2]
    with pytest.raises(InputError, match="share weights already"):
        billhook.compress(out, budget="params=0.8", out=tmp_path / "more", recipe="block-influence")
    with pytest.raises(InputError, match="cannot be healed"):
        heal_walk.heal(out, out=tmp_path / "healed")


def test_side_by_side(twins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billhook.recipes.find.scored", _third_least)
    monkeypatch.setattr("billhook.recipes.texts.CALIBRATION_TOKENS", 512)
    monkeypatch.setattr(side_by_side, "BASELINES", ("last",))
    monkeypatch.setattr(side_by_side, "judged_on", _one_text)
    for module in (side_by_side, entries):
        monkeypatch.setattr(module, "answers", lambda *rest: ())
    monkeypatch.setattr(entries, "paired", lambda *rest: ())
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(MINE))
    made = side_by_side.compare(twins, budgets="params=0.8,flops=0.8", out=tmp_path / "out", recipes=[mine])
    best, other = (entry for entry in made.entries if entry.recipe == "mine")
    assert best.schedule is not None and best.damage == pytest.approx(1, abs=1e-4)
    assert "saves no flops" in other.refused
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert "cell shared" in page and "decoder.3: the weights of decoder.2" in page


def _third_least(*rest: Any) -> tuple[dict[Address, float], int]:
    return {Address("decoder", i): float(i != 3) for i in range(5)}, 0


def _one_text(model: Any, *rest: Any, **sizes: int) -> list[Any]:
    return [("calibration", Windows.of(torch.randint(3, 200, (2, 32)), "noise"))]
