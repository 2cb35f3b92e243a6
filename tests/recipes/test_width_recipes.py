"""Every recipe of width on small models, and one of them all the way."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from families import FAMILIES, VOCABULARY, build

import billhook
from billhook import surgery
from billhook.anatomy import discover
from billhook.data import Windows
from billhook.heal import Healing, healed
from billhook.measure.ablation import Ablator
from billhook.measure.cost import CostModel
from billhook.measure.trace import trace
from billhook.plan.address import Address
from billhook.plan.budget import Budget
from billhook.plan.check import check
from billhook.plan.errors import InputError
from billhook.plan.plan import Keep, Plan
from billhook.plan.target import Target
from billhook.recipes.catalogue import load, names, source_of
from billhook.recipes.choices import Evolve
from billhook.recipes.find import Choice, find, pose_for
from billhook.recipes.heal import applied, differing
from billhook.recipes.opened import opened
from billhook.recipes.schema import Recipe

WIDE = [n for n in names() if load(n).wide and n != "mc-smoe"]  # which meets it by more than what is kept
DECODERS = [n for n, f in FAMILIES.items() if f.generates and list(f.stacks) == ["decoder"]]
WINDOWS = Windows.of(torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(2)), "noise")


def carried_out(recipe: Recipe, model: Any, place: Path, budget: str = "params=0.85") -> Choice:
    if recipe.trains:
        recipe = recipe.model_copy(update={"choice": recipe.choice.model_copy(update={"steps": 4})})
    if isinstance(recipe.choice, Evolve):
        recipe = recipe.model_copy(update={"choice": recipe.choice.model_copy(update={"generations": 2})})
    opened: Any = SimpleNamespace(model=model, anatomy=discover(model))
    problem = pose_for(recipe, opened.anatomy.outline, Budget.parse(budget), Target.REMOTE)
    seen = trace(model, opened.anatomy, WINDOWS, ("block", "sublayer", "angular"))
    return find(recipe, opened, problem, WINDOWS, seen, seed=0, place=place, progress=None)


@pytest.mark.parametrize("name", WIDE)
def test_the_budget_is_met_and_again(name: str, tmp_path: Path) -> None:
    recipe = load(name)
    family = "mixtral" if recipe.unit == "expert" else "llama"
    model = build(family)
    outline = discover(model).outline
    found = carried_out(recipe, model, tmp_path)
    check(Plan.of(found.found.drops, Target.REMOTE, found.keeps), outline)
    costs = CostModel(outline)
    share = costs.of(found.found.drops, found.keeps)["params"] / costs.dense["params"]
    assert (0.8 if recipe.unit in ("expert", "group") else 0.83) < share <= 0.85  # few of them, and large
    assert found.record.steps[-1].realised["params"] == pytest.approx(share)
    assert {keep.inner for keep in found.keeps} <= ({"neuron", "group"} if recipe.unit == "width" else {recipe.unit})
    assert carried_out(recipe, build(family), tmp_path) == found


def test_blocks_that_turn_the_stream_more_keep_more(tmp_path: Path) -> None:
    """CFSP shares by angular distance: a block that writes nothing loses most."""
    model = build("llama")
    with torch.no_grad():
        for linear in (model.model.layers[3].mlp.down_proj, model.model.layers[3].self_attn.o_proj):
            linear.weight.mul_(0.01)
    left = {keep.unit.block: len(keep.indices) for keep in carried_out(load("cfsp"), model, tmp_path).keeps}
    assert min(left, key=left.__getitem__) == 3


def test_all_the_way(tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder to a smaller, healed folder with its proof; the page draws what got narrower."""
    monkeypatch.setattr("billhook.recipes.texts.HEALING_TOKENS", 4096)
    out = tmp_path / "out"
    run = billhook.compress(tiny_lm, budget="params=0.8", out=out, recipe="flap", heal="closed-form", max_new_tokens=2)
    assert run.plan.keeps
    assert run.realised["params"] <= 0.8
    assert run.costs["params"].compressed == run.realised["params"] * run.costs["params"].dense
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "--left:" in page
    assert "% left" in page
    assert run.healing is not None
    assert any(refit.taken for refit in run.healing.refits)
    assert " kept, " in page
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "- width-pruning" in card
    assert "trust_remote_code=True" in card
    again = billhook.load(tmp_path / "out")
    parameters = sum(p.numel() for p in again.model.parameters())
    dense = sum(p.numel() for p in billhook.load(tiny_lm).model.parameters())
    assert dense - parameters == run.costs["params"].dense - run.costs["params"].compressed


def test_what_is_trained_while_it_narrows_comes_with_its_weights(tiny_lm: Path, tmp_path: Path) -> None:
    """And is proven as it is saved, next to the cut alone; it leaves nothing to heal with."""
    content = yaml.safe_load(source_of("hesso"))
    recipe, out = tmp_path / "short.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump({**content, "choice": {**content["choice"], "steps": 3}}), encoding="utf-8")
    run = billhook.compress(tiny_lm, budget="params=0.8", out=out, recipe=recipe, max_new_tokens=1)
    assert run.plan.keeps and run.realised["params"] <= 0.8 and run.healing is not None
    assert run.healing.method == "group-sparse" and run.healing.unhealed and run.healing.divergence is not None
    assert run.search is not None and run.search.objective == "divergence from dense"
    assert run.search.work > 0 and run.healing.work == 0
    assert "--heal" not in (out / "README.md").read_text(encoding="utf-8")
    assert sum(p.numel() for p in billhook.load(out).model.parameters()) < sum(
        p.numel() for p in billhook.load(tiny_lm).model.parameters()
    )
    for wrong, message in (({"heal": "closed-form"}, "trains what is left itself"), ({"target": "uniform"}, "widths")):
        with pytest.raises(InputError, match=message):
            billhook.compress(tiny_lm, budget="params=0.8", out=tmp_path / "no", recipe=recipe, **wrong)  # type: ignore[arg-type]


def test_unequal_widths_are_no_ordinary_checkpoint(tiny_lm: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="different widths"):
        billhook.compress(tiny_lm, budget="params=0.8", out=tmp_path / "out", recipe="flap", target="uniform")


def test_evolved_widths_are_no_ordinary_checkpoint_and_come_with_a_ledger(tiny_lm: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="different widths"):
        billhook.compress(tiny_lm, budget="params=0.8", out=tmp_path / "no", recipe="evopress-widths", target="uniform")
    model = build("llama")
    found = carried_out(load("evopress-widths"), model, tmp_path)
    first, last = sorted(tmp_path.glob("*.jsonl"), key=lambda file: len(file.read_bytes().splitlines()))
    assert found.record.objective == "divergence from dense" and found.record.steps[0].objective > 0
    looks = sum(len(file.read_bytes().splitlines()) - 1 for file in (first, last))
    assert found.record.evaluations == looks > 2 * load("evopress-widths").choice.offspring
    assert found.record.work > looks * 12, "at least a block on one window a look"


@pytest.mark.parametrize("name", DECODERS)
def test_widths_of_every_family_evolve(name: str, tmp_path: Path) -> None:
    """What is found is within the budget, and as far from dense as the record says. Of mixtures only groups can go."""
    recipe = load("evopress-widths")
    short = recipe.choice.model_copy(update={"offspring": 4, "screens": ()})
    recipe, model = recipe.model_copy(update={"choice": short}), build(name)
    found = carried_out(recipe, model, tmp_path, "params=0.98")
    anatomy = discover(model)
    costs = CostModel(anatomy.outline)
    check(Plan.of((), Target.REMOTE, found.keeps), anatomy.outline)
    assert costs.of((), found.keeps)["params"] <= 0.98 * costs.dense["params"]
    ablator = Ablator(model, anatomy, WINDOWS, "kl")
    assert ablator.narrowed(*found.keeps) == pytest.approx(found.record.steps[0].objective, rel=1e-5, abs=1e-8)


def test_a_healed_result_is_healed_further(tiny_lm: Path, tmp_path: Path) -> None:
    """The new weights are found in what was saved, by name and in the shapes of the dense model."""
    plan = Plan.of(
        ["decoder.1"], "remote", [Keep(unit=Address("decoder", 3, "mlp"), inner="neuron", indices=(0, 2, 40))]
    )
    model = opened(tiny_lm, dtype=None, device="cpu", trust_remote_code=False)
    with torch.no_grad():
        changed = {
            name: torch.randn_like(model.model.get_parameter(name))
            for name in ("model.layers.3.mlp.down_proj.weight", "model.layers.4.mlp.up_proj.weight")
        }
    small = applied(model, plan, Healing(changed, (), {}, 0, 0))
    found = differing(small, model, plan, "it")
    assert found.tensors.keys() == changed.keys()
    with healed(model.model, found):
        again = surgery.apply(model.model, model.anatomy, plan)
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_acts_on_blocks_do_not_go_with_widths() -> None:
    with pytest.raises(ValueError, match="works on what drops leave"):
        Recipe.model_validate({**load("flap").model_dump(), "heal": "none", "act": "gains"})
