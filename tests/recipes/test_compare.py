"""Every method side by side: all take part, the figures are those of one run, an interrupted one goes on."""

from __future__ import annotations

import copy
import importlib
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, randomise
from transformers import AutoModelForCausalLM, AutoTokenizer

from billhook.anatomy import discover
from billhook.data import Windows, evaluation
from billhook.evaluate import evidence, logits
from billhook.evaluate.generations import repetition
from billhook.evaluate.probes import answers, paired, posed
from billhook.measure.channels import channels
from billhook.plan.address import Address
from billhook.plan.budget import split_budgets
from billhook.plan.comparison import Comparison
from billhook.plan.errors import InputError
from billhook.plan.target import Target
from billhook.recipes import catalogue, entries
from billhook.recipes.compare import BASELINES, RANDOM_SEEDS, _distinct, _key, compare
from billhook.recipes.entries import _acted
from billhook.recipes.opened import opened
from billhook.recipes.settings import COMPARED_LENGTH, COMPARED_NEW_TOKENS, COMPARED_QUESTIONS, COMPARED_TOKENS
from billhook.recipes.texts import Texts, healing_text
from billhook.recipes.workplace import workplace
from billhook.surgery import apply

FEW = ("block-influence", "sublayer-greedy", "block-greedy")
BUDGETS = "params=0.9,0.6"

KILL = """
import os, signal, sys
from billhook.recipes import compare as walk

def dying(path, entries, keep=walk.keep, calls=iter(range(2))):
    keep(path, entries)
    if next(calls, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)

walk.keep = dying
walk.compare(sys.argv[1], budgets=sys.argv[3], out=sys.argv[2], recipes=sys.argv[4:])
"""


@pytest.fixture(scope="module")
def whole(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    out = tmp_path_factory.mktemp("compared") / "out"
    return compare(tiny_lm, budgets=BUDGETS, out=out, recipes=FEW), out


def test_every_method_and_baseline_at_every_budget(whole: tuple[Comparison, Path]) -> None:
    found, _ = whole
    expected = {(name, budget) for name in (*FEW, *BASELINES) for budget in ("params=0.9", "params=0.6")}
    assert {(entry.recipe, entry.asked) for entry in found.entries} == expected
    assert sum(entry.recipe == "random" for entry in found.entries) == RANDOM_SEEDS * 2
    assert {entry.seed for entry in found.entries if entry.recipe == "random"} == set(range(RANDOM_SEEDS))
    assert {e.recipe for e in found.entries if e.baseline} == set(BASELINES)
    for entry in found.entries:
        assert entry.refused or entry.realised["params"] <= float(entry.asked.partition("=")[2])


def test_a_figure_is_what_the_evidence_says_of_that_plan(whole: tuple[Comparison, Path], tiny_lm: Path) -> None:
    found, _ = whole
    entry = next(e for e in found.entries if e.recipe == "sublayer-greedy" and e.asked == "params=0.6")
    dense = AutoModelForCausalLM.from_pretrained(tiny_lm)
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    length = dense.config.max_position_embeddings
    texts = evaluation("builtin", tokenizer, tokens=COMPARED_TOKENS, length=min(COMPARED_LENGTH, length))
    smaller = apply(dense, discover(dense), [Address.parse(unit) for unit in entry.drops])
    assert evidence(dense, smaller, texts) == entry.evidence
    asked = posed(dense, tokenizer, COMPARED_QUESTIONS)
    assert paired(answers(dense, asked), answers(smaller, asked)) == entry.probes
    written = [repetition(side, tokenizer, max_new_tokens=COMPARED_NEW_TOKENS) for side in (dense, smaller)]
    assert entry.repeated == tuple(written)


def test_what_budgets_share_is_measured_once_and_charged_to_each(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def counted(*given: Any) -> Any:
        nonlocal looks
        looks += 1
        return channels(*given)

    monkeypatch.setattr("billhook.recipes.widths.channels", counted)
    found = compare(tiny_lm, budgets="params=0.95,0.9", out=tmp_path / "both", recipes=["cfsp"])
    assert looks == 1
    alone = compare(tiny_lm, budgets="params=0.9", out=tmp_path / "one", recipes=["cfsp"])
    (expected,) = (entry for entry in alone.entries if entry.recipe == "cfsp")
    first, second = (entry for entry in found.entries if entry.recipe == "cfsp")
    assert first.work == second.work == expected.work > 0
    assert second.keeps == expected.keeps


def test_what_was_written_is_what_was_returned(whole: tuple[Comparison, Path]) -> None:
    found, out = whole
    assert Comparison.model_validate_json((out / "comparison.json").read_text()) == found
    assert sorted(path.name for path in out.iterdir()) == ["comparison.html", "comparison.json"]
    assert not workplace(out).exists()


def test_killed_and_run_again(whole: tuple[Comparison, Path], tiny_lm: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILL, tiny_lm, out, BUDGETS, *FEW], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not out.exists()
    kept = [json.loads(path.read_text()) for path in workplace(out).glob("*.json")]
    assert len(kept) == 3
    again = compare(tiny_lm, budgets=BUDGETS, out=out, recipes=FEW)
    bare = {"seconds": 0.0}
    assert [e.model_copy(update=bare) for e in again.entries] == [e.model_copy(update=bare) for e in whole[0].entries]
    assert {entry["seconds"] for rows in kept for entry in rows} <= {entry.seconds for entry in again.entries}


def test_a_method_that_cannot_meet_a_budget_says_why(tiny_lm: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("name: own\ntitle: Own\nunit: attention\nscore: {word: block-influence}\nchoice: {word: one-shot}\n")
    told = []
    found = compare(tiny_lm, budgets="params=0.3", out=tmp_path / "out", recipes=[own], told=told.append)
    entry = found.entries[0]
    assert "cannot be met" in entry.refused
    assert not entry.drops and not entry.evidence
    assert told == list(found.entries)


def test_a_method_that_a_model_has_no_place_for_does_not_end_the_comparison(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Blocks of gemma4 read keys and values of earlier ones: searches and low ranks work, blocks cannot go."""
    model = build("gemma4")
    model.resize_token_embeddings(len(tiny_tokenizer))
    randomise(model)
    model.config.max_position_embeddings = 256
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    recipes = ["sublayer-greedy", "svd-llm", "fusegpt", "block-influence"]
    found = compare(tmp_path / "model", budgets="params=0.8", out=tmp_path / "out", recipes=recipes)
    entries = {entry.recipe: entry for entry in found.entries}
    for name in ("sublayer-greedy", "svd-llm"):
        assert entries[name].evidence and not entries[name].refused
    for name in ("fusegpt", "block-influence", *BASELINES):
        assert entries[name].refused and not entries[name].evidence


def test_a_result_that_cannot_be_judged_does_not_end_the_comparison(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it cost the others another pass of the dense model."""
    seen = []

    def broken(recipe: Any, model: Any, choice: Any, *rest: Any) -> Any:
        made = _acted(recipe, model, choice, *rest)
        if recipe.name == "first" and len(choice.found.drops) == 1:
            made = copy.deepcopy(made)
            made.get_output_embeddings().weight.data[5] = math.nan
        return made

    def counted(model: Any, ids: Any, *rest: Any) -> Any:
        seen.append(model)
        return logits.logits_by_slice(model, ids, *rest)

    monkeypatch.setattr("billhook.recipes.entries._acted", broken)
    monkeypatch.setattr(importlib.import_module("billhook.evaluate.evidence"), "logits_by_slice", counted)
    found = compare(tiny_lm, budgets=BUDGETS, out=tmp_path / "out", recipes=["first"])
    (lost,) = (entry for entry in found.entries if entry.refused)
    assert (lost.recipe, lost.asked) == ("first", "params=0.9")
    assert "the compressed model's log-likelihood of window 0 of" in lost.refused and not lost.evidence
    windows = sum(text.windows for text in found.entries[1].evidence)
    assert sum(model is seen[0] for model in seen) == windows, "the dense model ran again"


def test_healing_that_fails_is_what_the_refusal_names(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> Any:
        raise InputError("its regression has no solution")

    monkeypatch.setattr("billhook.recipes.texts.HEALING_TOKENS", 4096)
    monkeypatch.setattr("billhook.recipes.entries.new_weights", fail)
    found = compare(tiny_lm, budgets="params=0.7", out=tmp_path / "out", recipes=["first"], heal="closed-form")
    assert {entry.refused for entry in found.entries} == {"healing failed: its regression has no solution"}


def test_healed_beside_cut(tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same figures for the cut as without healing on the same text; acts are judged once; the page says it."""
    monkeypatch.setattr("billhook.recipes.texts.HEALING_TOKENS", 4096)
    recipes = ["block-influence", "wanda-structured", "checkfree"]
    given = {"budgets": "params=0.7", "recipes": recipes}
    found = compare(tiny_lm, out=tmp_path / "healed", heal="closed-form", **given)  # type: ignore[arg-type]
    bare = compare(tiny_lm, out=tmp_path / "bare", **given)  # type: ignore[arg-type]
    assert (found.heal, bare.heal) == ("closed-form", "none")
    for one, other in zip(found.entries, bare.entries, strict=True):
        assert (one.drops, one.keeps) == (other.drops, other.keeps)
        assert not other.healed
        assert bool(one.healed) == (one.recipe != "checkfree")
        assert one.judged == (one.healed or one.evidence)
    wanda = next(entry for entry in found.entries if entry.recipe == "wanda-structured")
    assert sum(text.kl.value for text in wanda.healed) < sum(text.kl.value for text in wanda.evidence)
    page = (tmp_path / "healed" / "comparison.html").read_text()
    assert "<th>healed<small>" in page
    assert "--left:" in page
    assert "neurons kept" in page
    assert "<th>healed<small>" not in (tmp_path / "bare" / "comparison.html").read_text()


def test_what_cuts_the_same_is_judged_once(tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second method finds what the first found: the same figures, its own search. What makes new weights of the
    same cut is judged for itself, whichever comes first."""
    judged: list[object] = []
    proof = entries._proof
    monkeypatch.setattr(entries, "_proof", lambda *given: judged.append(given[1]) or proof(*given))
    monkeypatch.setattr("billhook.recipes.texts.HEALING_TOKENS", 4096)
    depth = ["checkfree", "block-influence", "static-skip", "branch-gains"]
    recipes = [*depth, "wanda-structured", "low-rank", "svd-llm"]
    found = compare(tiny_lm, budgets="params=0.7", out=tmp_path / "out", recipes=recipes)
    by_name = {entry.recipe: entry for entry in found.entries}
    averaged, one, other, gains = (by_name[name] for name in depth)
    assert one.drops == other.drops == averaged.drops == gains.drops and one.evidence
    assert (one.evidence, one.probes, one.repeated) == (other.evidence, other.probes, other.repeated)
    assert averaged.evidence != one.evidence
    assert by_name["low-rank"].evidence != by_name["svd-llm"].evidence
    made = {"checkfree", "branch-gains", "low-rank", "svd-llm"}
    cuts = {(entry.drops, entry.keeps) for entry in found.entries if entry.recipe not in made}
    assert len(judged) == len(cuts) + len(made)


def test_acts_fit_weights_to_as_much_text_as_compress_gives_them(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Windows] = []
    fitted = entries.new_weights

    def watched(model: Any, plan: Any, act: str, windows: Windows, *rest: Any) -> Any:
        read.append(windows)
        return fitted(model, plan, act, windows, *rest)

    monkeypatch.setattr(entries, "new_weights", watched)
    found = compare(tiny_lm, budgets="params=0.6", out=tmp_path / "out", recipes=["branch-gains"])
    model = opened(tiny_lm, dtype=None, device="cpu", trust_remote_code=False)
    expected = healing_text(model, "builtin", 0, None)
    assert [windows.fingerprint for windows in read] == [expected.fingerprint]
    assert found.surveyed == expected.tokens > found.tokens


def test_all_that_come_along_take_part_but_those_of_single_weights(tiny_lm: Path, tmp_path: Path) -> None:
    """And those that cut nothing."""
    found = compare(tiny_lm, budgets="params=0.8", out=tmp_path / "out")
    apart = {recipe.name for recipe in catalogue.recipes() if recipe.unit in ("expert", "weight") or recipe.returns}
    assert {entry.recipe for entry in found.entries} == set(catalogue.names()) - apart != set()
    assert {e.target for e in found.entries} == {Target.UNIFORM, Target.REMOTE}


def test_entries_of_other_continuations_are_judged_again(tiny_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(tiny_lm, dtype=None, device="cpu", trust_remote_code=False)
    windows = Windows.of(torch.arange(8).reshape(2, 4), "text")
    texts = Texts(windows, None, None, None, (("other", windows),))
    given = catalogue.load("first"), ["params=0.8"], 0, model, texts
    before = _key(*given)
    assert _key(*given) == before
    monkeypatch.setattr("billhook.recipes.compare.COMPARED_NEW_TOKENS", COMPARED_NEW_TOKENS + 1)
    assert _key(*given) != before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("params=0.9,0.8", ["params=0.9", "params=0.8"]),
        ("params=0.9, blocks=24,20", ["params=0.9", "blocks=24", "blocks=20"]),
        ("params=0.8,0.8", ["params=0.8"]),
    ],
)
def test_budgets_side_by_side(text: str, expected: list[str]) -> None:
    assert split_budgets(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.9,0.8", "do not begin with a kind"),
        ("params=0.9,1.5", "1.5"),
        ("joy=0.9", "joy"),
        ("params=0.9,", "params="),
        ("until=cliff", "a comparison needs amounts"),
        ("params=0.9,latency=0.8", "budget latency=0.8 ends elsewhere for each method"),
    ],
)
def test_bad_budgets(text: str, message: str, tiny_lm: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        compare(tiny_lm, budgets=text, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_record_says_what_was_asked_for(whole: tuple[Comparison, Path]) -> None:
    assert (whole[0].recipes, whole[0].dtype) == (FEW, "")


@pytest.mark.parametrize("name", ["block-influence", "random"])
def test_two_recipes_of_one_name_are_refused(name: str, tiny_lm: Path, tmp_path: Path) -> None:
    """Unless they are the same."""
    own = tmp_path / "own.yaml"
    own.write_text(f"name: {name}\ntitle: Own\nunit: mlp\nobjective: kl\nchoice: {{word: greedy}}\n")
    with pytest.raises(InputError, match=f"two different recipes are called {name}"):
        compare(tiny_lm, budgets="params=0.9", out=tmp_path / "out", recipes=["block-influence", own])
    own.write_text(catalogue.source_of(name))
    assert [r.name for r in _distinct(["block-influence", own, *BASELINES])] == ["block-influence", *BASELINES]


def test_an_earlier_comparison_is_replaced_when_asked(tiny_lm: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for overwrite in (False, True):
        compare(tiny_lm, budgets="params=0.9", out=out, recipes=["block-influence"], overwrite=overwrite)
    with pytest.raises(InputError, match="already exists"):
        compare(tiny_lm, budgets="params=0.9", out=out)


def test_linears_taken_apart_to_the_same_ranks_are_not_the_same(tiny_lm: Path, tmp_path: Path) -> None:
    found = compare(tiny_lm, budgets="params=0.7", out=tmp_path / "out", recipes=["low-rank"])
    (low,) = (entry for entry in found.entries if entry.factors)
    assert low.evidence and entries._same_cut(low, [low]) is None
    cut = low.model_copy(update={"factors": ()})
    assert entries._same_cut(cut, [low, cut]) is cut
