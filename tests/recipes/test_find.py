"""From a recipe to units: the first look at a share of the calibration, and what it is charged."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from families import VOCABULARY, build, randomise
from transformers import LlamaConfig, LlamaForCausalLM

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.measure.ablation import Ablator, Kind
from billhook.measure.sums import Trace
from billhook.measure.trace import trace
from billhook.plan.address import Address
from billhook.plan.budget import Budget
from billhook.plan.errors import InputError
from billhook.recipes import opened
from billhook.recipes.catalogue import load
from billhook.recipes.choices import Greedy, OneShot
from billhook.recipes.find import find, require_path
from billhook.recipes.schema import Recipe
from billhook.recipes.searched import ledger_of
from billhook.search import Memo, greedy, pose
from billhook.search.cliff import cliff


def numbered(count: int) -> Windows:
    """Windows that hold nothing but their own number."""
    return Windows.of(torch.arange(count).unsqueeze(1).expand(-1, 4), "numbered")


@pytest.mark.parametrize(
    ("count", "share", "chosen"),
    [(8, 0.25, [0, 4]), (10, 0.3, [0, 3, 6]), (8, 0.75, [0, 1, 2, 4, 5, 6]), (8, 0.01, [0]), (1, 0.5, [0])],
)
def test_a_share_is_spread_evenly_and_never_empty(count: int, share: float, chosen: list[int]) -> None:
    assert numbered(count).share(share).ids[:, 0].tolist() == chosen


def test_a_share_has_its_own_name_and_fingerprint_and_the_whole_keeps_its() -> None:
    windows = numbered(8)
    assert windows.share(1.0) is windows
    part = windows.share(0.25)
    assert part.name == "numbered, 25%"
    assert part.fingerprint == Windows.of(windows.ids[[0, 4]], "again").fingerprint != windows.fingerprint


@pytest.mark.parametrize("name", ["billhook", "torch", "transformers"])
def test_figures_of_other_versions_are_not_taken_over(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    model = SimpleNamespace(model=build("llama"))
    windows = numbered(4)
    before = ledger_of(tmp_path, "kl", model, windows)
    assert before.header[name] == metadata.version(name)
    before.record(("decoder.1",), 1.0, 1)
    assert ledger_of(tmp_path, "kl", model, windows).entries
    monkeypatch.setattr(opened, "version", lambda asked: "99" if asked == name else metadata.version(asked))
    assert not ledger_of(tmp_path, "kl", model, windows).entries


def test_the_first_look_is_charged_to_every_step(tmp_path: Path) -> None:
    ids = torch.randint(3, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(2))
    windows = Windows.of(ids, "noise")
    model = build("llama")
    anatomy = discover(model)
    problem = pose(anatomy.outline, Budget.parse("blocks=3"), "block")
    choice = Greedy(word="greedy", screen=0.5)
    recipe = Recipe(name="mine", title="Mine", unit="block", objective="kl", choice=choice)
    dense = SimpleNamespace(model=model, anatomy=anatomy)
    found = find(recipe, dense, problem, windows, Trace(), seed=0, place=tmp_path, progress=None)

    [rises] = found.importance.values()
    estimates = {Address.parse(unit): rise for unit, rise in rises.items()}
    alone = greedy(problem, Memo(Ablator(model, anatomy, windows)), estimates=estimates)
    look = 2 * 12 * (5 + 4 + 3 + 2 + 1 + 0)  # dense and each of the 5 blocks alone, on half of the windows
    assert [step.work for step in found.record.steps] == [step.work + look for step in alone.steps]
    assert [step.units for step in found.record.steps] == [step.units for step in alone.steps]
    assert found.record.work == alone.work + look
    assert found.record.evaluations == alone.evaluations + 6


class Counted:
    """An objective that counts each evaluation as one pass through all blocks that are left, as published."""

    def __init__(self, objective: Ablator, blocks: int) -> None:
        self.objective, self.blocks, self.work = objective, blocks, objective.work

    def at(self, drops: frozenset[Address]) -> float:
        gone = {unit.parent for unit in drops if both(unit) <= drops}
        self.work += (self.blocks - len(gone)) * self.objective.replay.tokens
        return self.objective.at(drops)

    def move(self, drops: frozenset[Address]) -> None:
        self.objective.move(drops)


def both(unit: Address) -> set[Address]:
    return {Address(unit.stack, unit.block, kind) for kind in ("attention", "mlp")}


def test_the_default_greedy_costs_a_tenth_of_the_plain_form_at_most(tmp_path: Path) -> None:
    """In block-token forwards, on a model of 24 blocks that each add little to the stream, as those of real ones do."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=24, **sizes)).eval()
    randomise(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.3)
            layer.mlp.down_proj.weight.mul_(0.3)
    anatomy = discover(model)
    ids = torch.randint(3, VOCABULARY, (6, 8), generator=torch.Generator().manual_seed(2))
    windows = Windows.of(ids, "noise")
    problem = pose(anatomy.outline, Budget.parse("params=0.8"))
    recipe, opened = load("sublayer-greedy"), SimpleNamespace(model=model, anatomy=anatomy)
    lazy = find(recipe, opened, problem, windows, Trace(), seed=0, place=tmp_path, progress=None).found
    counted = Counted(Ablator(model, anatomy, windows, recipe.objective or "kl"), 24)
    plain = greedy(problem, Memo(counted), lazy=False)
    assert 10 * lazy.work <= plain.work


def with_idle_attentions(idle: set[int]) -> Any:
    """Attentions that write next to nothing, and others that do."""
    model = build("llama")
    with torch.no_grad():
        for block in idle:
            model.model.layers[block].self_attn.o_proj.weight.mul_(1e-5)
    return model


@pytest.mark.parametrize("choice", [Greedy(word="greedy"), Greedy(word="greedy", screen=0.5), OneShot(word="one-shot")])
def test_until_the_cliff_takes_the_idle_attentions_and_no_more(choice: Any, tmp_path: Path) -> None:
    model = with_idle_attentions({0, 2, 3})
    anatomy = discover(model)
    ids = torch.randint(3, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(2))
    windows = Windows.of(ids, "noise")
    problem = pose(anatomy.outline, Budget.parse("until=cliff"), "attention")
    words: dict[str, Any] = {"score": {"word": "block-influence"}} if choice.word == "one-shot" else {"objective": "kl"}
    recipe = Recipe(name="mine", title="Mine", unit="attention", choice=choice, **words)
    seen = trace(model, anatomy, windows, ["sublayer"])
    opened: Any = SimpleNamespace(model=model, anatomy=anatomy)
    found = find(recipe, opened, problem, windows, seen, seed=0, place=tmp_path, progress=None)
    assert found.found.drops == {Address("decoder", block, "attention") for block in (0, 2, 3)}
    assert found.record.objective == "divergence from dense"
    assert cliff(found.record.steps) == 3
    assert list(tmp_path.glob("*.jsonl")), "paid figures are kept"


@pytest.mark.parametrize("name", ["random", "angular-span", "additive-knapsack", "unified-skip"])
def test_until_the_cliff_needs_a_path(name: str) -> None:
    with pytest.raises(InputError, match=f"recipe {name} .* has none: use a greedy or one-shot recipe"):
        require_path(load(name), Budget.parse("until=cliff"))
    require_path(load(name), Budget.parse("params=0.8"))


def test_until_the_cliff_is_counted_in_nats() -> None:
    def by(objective: Any) -> Recipe:
        return Recipe(name="mine", title="Mine", unit="block", objective=objective, choice=Greedy(word="greedy"))

    for objective in ("kl", "loss"):
        require_path(by(objective), Budget.parse("until=cliff"))
    for objective in set(get_args(Kind)) - {"kl", "loss"}:
        with pytest.raises(InputError, match=f"the objectives kl and loss, and recipe mine goes by {objective}:"):
            require_path(by(objective), Budget.parse("until=cliff"))
        require_path(by(objective), Budget.parse("params=0.8"))
