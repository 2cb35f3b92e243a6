"""Recipes of single weights, all the way."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from families import VOCABULARY, build
from transformers import AutoModelForCausalLM

import billhook
from billhook.anatomy import discover
from billhook.data import Windows
from billhook.heal import closed_form, fuse
from billhook.measure.cost import cost
from billhook.measure.sums import Trace
from billhook.plan.arrays import Arrays
from billhook.plan.budget import Budget
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.target import Target
from billhook.recipes.apply import apply as apply_on_disk
from billhook.recipes.catalogue import load, names, source_of
from billhook.recipes.compare import compare
from billhook.recipes.evaluate import calibrated_with, evaluate
from billhook.recipes.find import Choice, find, pose_for
from billhook.recipes.generate import generate as recipes_generate
from billhook.recipes.heal import heal
from billhook.recipes.learned_weights import after, kept_of
from billhook.recipes.schema import Recipe
from billhook.recipes.settled import way_of
from billhook.recipes.training import _edits
from billhook.recipes.words import explained, needs, passes
from billhook.report.numbers import percent
from billhook.search.sparse_steps import Sparsified
from billhook.surgery import apply

WINDOWS = Windows.of(torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(2)), "noise")
SPARSE = [name for name in names() if load(name).unit == "weight"]


def carried_out(name: str, model: Any, place: Path, budget: str = "params=0.5") -> Choice:
    about: Any = SimpleNamespace(model=model, anatomy=discover(model))
    recipe = load(name)
    if recipe.trains:
        recipe = recipe.model_copy(update={"choice": recipe.choice.model_copy(update={"steps": 5})})
    problem = pose_for(recipe, about.anatomy.outline, Budget.parse(budget), Target.UNIFORM)
    return find(recipe, about, problem, WINDOWS, Trace(), seed=0, place=place, progress=None)


@pytest.mark.parametrize("name", SPARSE)
def test_the_budget_is_met_and_again(name: str, tmp_path: Path) -> None:
    model = build("llama")
    found = carried_out(name, model, tmp_path)
    plan = found.plan(Target.UNIFORM)
    zeros = {edit.unit: sum(edit.zeros.values()) for edit in plan.sparsities}
    share = cost(discover(model).outline, zeros=zeros)["params"] / discover(model).outline.block_params
    assert 0.49 < share <= 0.5 and found.record.steps[-1].realised["params"] == pytest.approx(share)
    assert {edit.pattern for edit in plan.sparsities} == {load(name).choice.pattern}  # type: ignore[union-attr]
    assert (found.healing is not None) == (name.startswith("sparsegpt") or name in ("pst", "gradient-flow"))
    assert found.healing is None or found.healing.work == 0  # counted in the search
    assert carried_out(name, build("llama"), tmp_path) == found
    applied = apply(model, discover(model), plan)  # counts and patterns are checked
    left = sum(int((p != 0).sum()) for n, p in applied.named_parameters() if ".layers." in n)
    assert left == round(share * discover(model).outline.block_params)


def test_the_budget_of_a_pattern_goes_below_and_not_above_it(tmp_path: Path) -> None:
    for asked, low, high in (("params=0.8", 0.49, 0.54), ("params=0.3", 0.29, 0.3)):
        found = carried_out("wanda-2-4", build("llama"), tmp_path, asked)
        assert low < found.record.steps[-1].realised["params"] <= high


def test_all_the_way(tiny_lm: Path, tmp_path: Path) -> None:
    """An ordinary checkpoint with its proof; the plan alone sets the same weights to zero again, uncorrected."""
    out = tmp_path / "out"
    run = billhook.compress(tiny_lm, budget="params=0.5", out=out, recipe="sparsegpt-2-4", max_new_tokens=1)
    assert run.plan.target == "uniform" and run.healing is not None and run.healing.method == "second-order"
    model = AutoModelForCausalLM.from_pretrained(out)
    left = sum(int((p != 0).sum()) for name, p in model.named_parameters() if ".layers." in name)
    assert left == run.costs["params"].compressed <= 0.5 * run.costs["params"].dense
    assert run.realised["size"] == run.realised["flops"] == 1
    assert Plan.read(out) == run.plan
    assert len(Plan.read(out).arrays) == sum(len(edit.zeros) for edit in run.plan.sparsities)
    page, card = ((out / file).read_text(encoding="utf-8") for file in ("report.html", "README.md"))
    assert "the share of weights that is zero" in page and " set to zero, 2:4" in page
    assert "- sparsity-2-4\n" in card and "--recipe sparsegpt-2-4" in card
    assert "Zeros are stored and multiplied with like any weight" in card

    again = apply_on_disk(tiny_lm, out, out=tmp_path / "again")
    assert again.costs["params"] == run.costs["params"] and "not healed" in again.environment
    one, two = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (out, tmp_path / "again"))
    assert all(torch.equal(one[key] == 0, two[key] == 0) for key in one)
    assert not all(torch.equal(one[key], two[key]) for key in one)

    for way in (closed_form, fuse):
        with pytest.raises(InputError, match="that the plan sets to zero"):
            way(model, discover(model), run.plan, [])
    with pytest.raises(InputError, match="that the plan sets to zero"):
        heal(out, out=tmp_path / "healed")


def _short(name: str, place: Path) -> Path:
    """A recipe that is trained, with few steps."""
    content = yaml.safe_load(source_of(name))
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**content, "choice": {**content["choice"], "steps": 3}}), encoding="utf-8")
    return path


def test_learned_masks_begin_with_those_of_an_earlier_result(tiny_lm: Path, tmp_path: Path) -> None:
    """And keep most of them: three steps change little."""
    recipe, earlier = _short("maskllm", tmp_path), tmp_path / "earlier"
    about: dict[str, Any] = {"budget": "params=0.5", "max_new_tokens": 1}
    first = billhook.compress(tiny_lm, out=earlier, recipe="magnitude-2-4", **about)
    run = billhook.compress(tiny_lm, out=tmp_path / "out", recipe=recipe, prior=earlier, **about)
    assert run.search is not None and run.search.prior == str(earlier) and first.search is not None
    assert run.search.objective == "divergence from dense" and run.search.steps[-1].objective is not None
    one, two = (AutoModelForCausalLM.from_pretrained(at).state_dict() for at in (earlier, tmp_path / "out"))
    alike = [((one[key] == 0) == (two[key] == 0)).float().mean().item() for key in one if ".layers." in key]
    assert sum(alike) / len(alike) > 0.95
    assert f"--prior {earlier}" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert first.measures is not None
    elsewhere = first.model_copy(update={"measures": first.measures.model_copy(update={"calibration": "other.txt"})})
    (earlier / "billhook.json").write_text(elsewhere.model_dump_json(), encoding="utf-8")
    assert calibrated_with(earlier) == calibrated_with(earlier / "billhook.json") == ["other.txt"]
    with pytest.raises(InputError, match="recipe wanda learns none"):
        billhook.compress(tiny_lm, out=tmp_path / "no", recipe="wanda", prior=earlier, **about)
    dropped = tmp_path / "dropped.json"
    dropped.write_text(Plan.of(["decoder.1"]).model_dump_json(), encoding="utf-8")
    with pytest.raises(InputError, match="sets no weights to zero"):
        billhook.compress(tiny_lm, out=tmp_path / "no", recipe=recipe, prior=dropped, **about)


def test_a_prior_of_another_budget_is_filled_up_or_thinned(tmp_path: Path) -> None:
    """By magnitude: what the prior keeps comes first."""
    model = build("llama")
    about: Any = SimpleNamespace(model=model, anatomy=discover(model))
    sparser = carried_out("magnitude-2-4", model, tmp_path, "params=0.3").plan(Target.UNIFORM)
    held = Sparsified(model, about.anatomy, "decoder", WINDOWS, "kl")
    before, filled = kept_of(sparser, about, held), after(sparser, about, held, 0.5, (2, 4))
    thinned = after(sparser, about, held, 0.25, (2, 4))
    for name, kept in filled.items():
        assert kept.float().mean() == 0.5 and not (before[name] & ~kept).any()
        assert thinned[name].float().mean() == 0.25 and not (thinned[name] & ~before[name]).any()


def test_methods_side_by_side(tiny_lm: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = compare(tiny_lm, budgets="params=0.6", recipes=["wanda", "sparsegpt"], out=out)
    found = {entry.recipe: entry for entry in result.entries if not entry.baseline}
    for entry in found.values():
        assert not entry.refused and entry.sparsities and entry.realised["params"] <= 0.6
    assert found["wanda"].damage != found["sparsegpt"].damage
    assert "weights zero" in (out / "comparison.html").read_text(encoding="utf-8")


def test_what_is_asked_in_vain_is_refused(tiny_lm: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="would fill the zeros of recipe wanda again"):
        billhook.compress(tiny_lm, budget="params=0.5", out=tmp_path / "out", recipe="wanda", heal="closed-form")
    with pytest.raises(InputError, match="zeros among the weights save parameters alone"):
        billhook.compress(tiny_lm, budget="size=0.5", out=tmp_path / "out", recipe="wanda")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"unit": "mlp"}, "masks with the unit weight"),
        ({"heal": "lora"}, "heal none"),
        ({"choice": {"word": "masks", "by": "wanda", "pattern": "4:4"}}, "N:M"),
        ({"choice": {"word": "masks", "by": "wanda", "pattern": "2:4", "allocation": "zeroth-order"}}, "uniform"),
        ({"score": {"word": "magnitude"}}, "no other choice has one"),
        ({"choice": {"word": "learned-masks", "by": "wanda", "pattern": "2:4", "steps": 4}}, "needs an objective"),
        ({"choice": {"word": "learned-masks", "by": "wanda", "pattern": "unstructured", "steps": 4}}, "8 weights"),
        ({"objective": "kl"}, "no other has one"),
    ],
)
def test_words_that_do_not_go_together(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate({**load("wanda").model_dump(), **changed})


def test_a_recipe_of_masks_can_tune_norms() -> None:
    tuned = Recipe.model_validate({**load("sparsegpt").model_dump(), "heal": "tune"})
    assert way_of(tuned, None) == "tune" and way_of(tuned, "none") == "none"


def test_what_is_said_of_them() -> None:
    assert needs(load("magnitude-sparse")) == "nothing" and passes(load("magnitude-2-4")) == "0"
    assert needs(load("wanda")) == "data" and passes(load("sparsegpt")) == "2"
    assert needs(load("maskllm")) == "training" and passes(load("maskllm")) == "4 a step"
    assert "zero" in explained(load("ecoflap"))["choice masks"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short texts, and no questions and no clock, which other tests are about."""
    for name in ("compress", "heal", "proof", "evaluate"):
        module = importlib.import_module(f"billhook.recipes.{name}")
        sizes = {"CALIBRATION_LENGTH": 64, "HEALING_TOKENS": 2048, "EVALUATION_TOKENS": 512, "EVALUATION_LENGTH": 64}
        for constant, size in sizes.items():
            monkeypatch.setattr(module, constant, size, raising=False)
        for step in ("probes", "bench", "generations"):
            monkeypatch.setattr(module, step, lambda *_, **__: (), raising=False)


@pytest.mark.usefixtures("small")
def test_paths_beside_the_masks_within_one_budget(tiny_lm: Path, tmp_path: Path) -> None:
    """Cut and healed at once; eval, generate and the record are about the model with its paths, and count them."""
    out = tmp_path / "out"
    about: dict[str, Any] = {"recipe": "sparsegpt-2-4", "max_new_tokens": 1}
    run = billhook.compress(tiny_lm, budget="params=0.6", out=out, heal="eora", **about)
    assert run.healing is not None and [step.method for step in run.healing.steps] == ["second-order", "eora"]
    assert len(run.healing.paths) == 35 and not run.healing.refused
    assert 0.57 < run.realised["params"] <= 0.6 and run.realised["size"] > 1 and run.realised["flops"] > 1
    assert run.evidence[0].kl.value < run.healing.unhealed[0].kl.value
    again = evaluate(out, against=tiny_lm)
    assert again.costs == run.costs
    assert [text.kl.value for text in again.evidence] == pytest.approx([text.kl.value for text in run.evidence])
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "PeftModel.from_pretrained(model, " in card and "- paths of low rank: 35, of rank " in card
    assert "--heal eora" in card and "billhook heal" not in card
    zeros = sum(sum(edit.zeros.values()) for edit in run.plan.sparsities) / run.outline.block_params
    assert zeros > 0.45 and f"with {percent(zeros)} of its block parameters set to zero" in card

    for refused in (
        lambda: billhook.compress(out, budget="params=0.5", out=tmp_path / "no", **about),
        lambda: apply_on_disk(out, Plan.of(["decoder.1"]), out=tmp_path / "no"),
        lambda: recipes_generate(out, "a", policy="static-skip"),
        lambda: heal(out, method="eora", out=tmp_path / "no"),
    ):
        with pytest.raises(InputError, match="paths beside its linears") as error:
            refused()
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="paths of --heal eora alone have"):
        billhook.compress(tiny_lm, budget="params=0.05", out=tmp_path / "no", heal="eora", **about)
    with pytest.raises(InputError, match="takes none"):
        billhook.compress(tiny_lm, budget="params=0.6", out=tmp_path / "no", heal="eora", recipe="cfsp")


@pytest.mark.usefixtures("small")
def test_paths_beside_an_earlier_result(tiny_lm: Path, tmp_path: Path) -> None:
    """They come on top of what its budget left, and that is said."""
    cut, out = tmp_path / "cut", tmp_path / "out"
    before = billhook.compress(tiny_lm, budget="params=0.5", out=cut, recipe="magnitude-2-4", max_new_tokens=1)
    run = heal(cut, method="eora", out=out, max_new_tokens=1)
    assert run.healing is not None and run.healing.paths and run.plan == before.plan
    added = run.costs["params"].compressed - before.costs["params"].compressed
    assert 0.08 < added / run.costs["params"].dense < 0.11 and run.realised["params"] > 0.57
    one, two = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (cut, out))
    assert all(torch.equal(one[key], two[key]) for key in one)
    loaded = billhook.load(out)
    told = recipes_generate(out, "The sea", max_new_tokens=4).text
    assert told == billhook.generate(loaded.model, loaded.tokenizer, "The sea", max_new_tokens=4)
    commands = (out / "README.md").read_text(encoding="utf-8")
    assert "--heal none" in commands and "billhook heal CUT --method eora" in commands
    dropped = tmp_path / "dropped"
    apply_on_disk(tiny_lm, Plan.of(["decoder.1"]), out=dropped)
    with pytest.raises(InputError, match="sets no weights to zero"):
        heal(dropped, method="eora", out=tmp_path / "no")


@pytest.mark.usefixtures("small")
def test_norms_and_scales_are_tuned_around_masks(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later, and at once: the zeros are where the masks left them, and the model is nearer to the dense one."""
    monkeypatch.setattr("billhook.recipes.compress.TRAINING_TOKENS", 1024)
    monkeypatch.setattr("billhook.recipes.training.TRAINING_LENGTH", 64)
    monkeypatch.setattr("billhook.recipes.texts.HEALING_TOKENS", 2048)
    about: dict[str, Any] = {"budget": "params=0.5", "max_new_tokens": 1}
    for recipe, before in (("magnitude-2-4", []), ("sparsegpt-2-4", ["second-order"])):
        cut, out = tmp_path / recipe, tmp_path / f"{recipe}-tuned"
        billhook.compress(tiny_lm, out=cut, recipe=recipe, **about)
        if before:
            run = billhook.compress(tiny_lm, out=out, recipe=recipe, heal="tune", **about)
        else:
            run = heal(cut, method="tune", tokens=1024, out=out, max_new_tokens=1)
        assert run.healing is not None and [step.method for step in run.healing.steps] == [*before, "tune"]
        assert run.healing.training is not None and run.healing.training.best > 0
        one, two = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (cut, out))
        changed = [key for key in one if not torch.equal(one[key], two[key])]
        assert {one[key].ndim for key in changed} == {1, 2} and one.keys() == two.keys()
        assert all(torch.equal(one[key] == 0, two[key] == 0) for key in changed)
    with pytest.raises(InputError, match="distill would count on weights"):
        heal(cut, method="distill", out=tmp_path / "no")


def test_a_training_is_kept_for_the_very_masks(tmp_path: Path) -> None:
    """Others with as many zeros in each linear are of another plan."""
    one = carried_out("magnitude-2-4", build("llama"), tmp_path).plan(Target.UNIFORM)
    flipped = Arrays({name: np.flip(mask) for name, mask in one.arrays.items()})
    assert _edits(one) != _edits(one.model_copy(update={"arrays": flipped}))
