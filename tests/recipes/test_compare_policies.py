"""Policies side by side: all take part at each amount of work, figures are those of the parts, a killed run goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.terminal import billhook
from families import build
from transformers import AutoModelForCausalLM, AutoTokenizer

from billhook.anatomy import discover
from billhook.data import Windows, calibration
from billhook.data.calibrate import evaluation
from billhook.data.questions import PROBES
from billhook.evaluate.exact import Expected, exact
from billhook.evaluate.policy_probes import answers_step_by_step
from billhook.evaluate.policy_quality import Judge
from billhook.evaluate.turn_policy import turned_to
from billhook.plan.errors import InputError
from billhook.plan.policy_comparison import PolicyComparison
from billhook.plan.record import Workload
from billhook.recipes import compare_policies as walk
from billhook.recipes.compare_policies import STANDARD, compare_policies
from billhook.recipes.workplace import workplace
from billhook.runtime import first_router, mixture_of_depths
from billhook.runtime.catalogue import policy_of
from billhook.runtime.policy import Policy

SMALL: dict[str, Any] = {
    "billhook.recipes.policy.LENGTH": 12,
    "billhook.recipes.policy.JUDGED_TOKENS": 36,
    "billhook.recipes.policy.FITTED_TOKENS": 36,
    "billhook.recipes.compare_policies.TURNED_TOKENS": 24,
    "billhook.recipes.compare_policies.RANDOM_SEEDS": 2,
    "billhook.recipes.compare_policies.ROUNDS": 1,
    "billhook.evaluate.turn_policy.STEPS": 4,
    "billhook.data.questions.ITEMS": 2,
    "billhook.runtime.voids.GENERATED": 3,
}
SHORT = Workload(name="generate", batch=1, prompt_tokens=8, new_tokens=6)
FEW = ("static-skip", "ffn-skip:first=1,last=0,warmup=0", "self-speculation:units=decoder.1")
BUDGET = "flops=0.9"

KILL = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {here!r}]
import test_compare_policies as test
from billhook.recipes import compare_policies as walk

patch = test.pytest.MonkeyPatch()
test.shrink(patch)
def dying(path, rows, keep=walk.keep, calls=iter(range(2))):
    keep(path, rows)
    if next(calls, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
walk.keep = dying
walk.compare_policies(sys.argv[1], out=sys.argv[2], budgets=test.BUDGET, policies=test.FEW)
"""


def shrink(patch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        patch.setattr(name, value)
    patch.setattr("billhook.data.questions.PROBES", {n: PROBES[n] for n in ("counting on", "recall by key")})
    for module, name in ((first_router, "train_routers"), (mixture_of_depths, "train_depth_routers")):
        train = getattr(module, name)
        patch.setattr(module, name, lambda *args, train=train, **kwargs: train(*args, **{**kwargs, "steps": 2}))
    timed = walk.generation_speed
    patch.setattr(walk, "generation_speed", lambda *args, **kwargs: timed(*args, workload=SHORT, **kwargs))


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        yield


@pytest.fixture(scope="module")
def whole(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PolicyComparison, Path]:
    out = tmp_path_factory.mktemp("policies") / "out"
    return compare_policies(tiny_lm, out=out, budgets=BUDGET, policies=FEW), out


def test_every_policy_and_baseline(whole: tuple[PolicyComparison, Path]) -> None:
    found, out = whole
    names = [entry.name for entry in found.entries]
    assert names == ["plain", "at random (seed 0)", "at random (seed 1)", "even-skip", *FEW]
    assert [e.baseline for e in found.entries] == [True] * 4 + [False] * 3
    assert [entry.refused for entry in found.entries] == [""] * 7
    for entry in found.entries:
        if entry.savings is not None:
            assert entry.asked == BUDGET and len(entry.evidence) == 2 and entry.probes
            # what is decided online was turned on other text
            assert entry.savings.flops <= (1.0 if entry.policy == "ffn-skip" else 0.9)
            assert entry.timing is not None and entry.timing.workload == SHORT
    drafted = found.entries[-1]
    assert drafted.drafting is not None and drafted.drafting.same_text == 1.0
    assert (drafted.asked, drafted.damage, drafted.exact) == ("", 1.0, None)
    random = [entry.parameters["units"] for entry in found.entries[1:3]]
    assert random[0] != random[1]
    assert PolicyComparison.model_validate_json((out / "comparison.json").read_text()) == found
    assert sorted(path.name for path in out.iterdir()) == ["comparison.html", "comparison.json"]
    assert not workplace(out).exists()


def test_a_figure_is_what_the_judge_says_of_that_setting(whole: tuple[PolicyComparison, Path], tiny_lm: Path) -> None:
    found, _ = whole
    entry = next(e for e in found.entries if e.policy == "ffn-skip")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_lm), AutoTokenizer.from_pretrained(tiny_lm)
    (domain, text), _ = evaluation("builtin", tokenizer, tokens=36, length=12, model=model, seed=0)
    judged, saved = Judge(model, discover(model), text, domain=domain)(policy_of("ffn-skip").of(entry.parameters))
    assert (judged, saved) == (entry.evidence[0], entry.savings)


def test_killed_and_run_again(whole: tuple[PolicyComparison, Path], tiny_lm: Path, tmp_path: Path) -> None:
    out, here = tmp_path / "out", Path(__file__).parent
    command = [sys.executable, "-c", KILL.format(tests=str(here.parent), here=str(here)), tiny_lm, out]
    killed = subprocess.run(command, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    kept = [json.loads(path.read_text()) for path in workplace(out).glob("*.json")]
    assert len(kept) == 3
    again = compare_policies(tiny_lm, out=out, budgets=BUDGET, policies=FEW)
    bare = {"seconds": 0.0, "timing": None, "drafting": None}
    plain = [[e.model_copy(update=bare) for e in found.entries] for found in (again, whole[0])]
    assert plain[0] == plain[1]
    seconds = {rows[0]["seconds"] for rows in kept}
    assert seconds <= {entry.seconds for entry in again.entries}


def test_the_command(tiny_lm: Path, tmp_path: Path) -> None:
    """All that come along; those that cannot meet an amount of work say why; one JSON object and a live table."""
    out = tmp_path / "out"
    result = billhook("policies", "compare", tiny_lm, "--budget", "flops=0.5", "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert {e["policy"] for e in found["entries"]} == {
        "plain", "even-skip", *(text.partition(":")[0] for text in STANDARD)
    }  # fmt: skip
    assert found["paths"]["html"] == str(out / "comparison.html")
    refused = next(e for e in found["entries"] if e["policy"] == "ffn-skip")
    assert "never costs as little as 50%" in refused["refused"]
    told = [line for line in result.stderr.splitlines() if not line.startswith("billhook:")]  # no heartbeat
    assert len(told) == len(found["entries"])  # headings and all but the plain model
    shared = next(e for e in found["entries"] if e["policy"] == "kv-share")
    assert (shared["asked"], shared["savings"]["kv_bytes"]) == ("", pytest.approx(3 / 5))  # it spares no work
    again = billhook("policies", "compare", tiny_lm, "--out", out)
    assert (again.exit_code, "already exists" in again.stderr) == (2, True)


def test_a_policy_that_spares_cache_is_held_against_skipping_at_the_same_cache(tiny_lm: Path, tmp_path: Path) -> None:
    """Three of five blocks keep keys and values: by sharing in spans of two, or by skipping two."""
    policies = ("static-skip", "kv-share", "ffn-skip:first=1,last=0,warmup=0")
    found = compare_policies(tiny_lm, out=tmp_path / "out", budgets="kv_bytes=0.6", policies=policies)
    caches = {e.name: e.savings.kv_bytes for e in found.at("kv_bytes=0.6") if e.savings}
    assert caches == dict.fromkeys(
        ["at random (seed 0)", "at random (seed 1)", "even-skip", "static-skip", "kv-share"], pytest.approx(0.6)
    )
    (given,) = [e for e in found.at("") if not e.baseline]
    assert (given.policy, given.savings and given.savings.kv_bytes) == ("ffn-skip", 1.0)
    assert next(e for e in found.entries if e.policy == "kv-share").parameters["span"] == 2


def test_the_help_names_all_that_come_along() -> None:
    said = " ".join(billhook("policies", "compare", "--help").stdout.replace("│", " ").split())
    assert all(text.partition(":")[0] in said for text in STANDARD)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--budget", "params=0.8"], "shares of the work"),
        (["--policy", "voyds"], "there is no policy 'voyds'"),
    ],
)
def test_bad_words_get_one_line(tiny_lm: Path, tmp_path: Path, arguments: list[str], reason: str) -> None:
    result = billhook("policies", "compare", tiny_lm, "--out", tmp_path / "out", *arguments)
    assert (result.exit_code, reason in result.stderr, result.stderr.count("\n")) == (2, True, 1)
    assert not (tmp_path / "out").exists()


def test_exact_answers_step_by_step_are_those_of_one_pass() -> None:
    """In the plain model; under a policy that acts on generated tokens alone they differ, which one pass cannot see."""
    model = build("llama")
    anatomy = discover(model)
    model.get_output_embeddings().weight.data.mul_(3)
    ids = [tuple(int(i) for i in row) for row in calibration_ids()]
    said = [_greedy(model, one) for one in ids]
    asked = {"copied": [Expected((*one, *more), 3) for one, more in zip(ids, said, strict=True)]}
    asked["wrong"] = [Expected((*one.ids[:-1], (one.ids[-1] + 1) % 100), 3) for one in asked["copied"]]
    asked["longer"] = [Expected((*one, *_greedy(model, one, 5)), 5) for one in ids[:2]]
    found = answers_step_by_step(model, asked)
    assert found == {"copied": [True] * 4, "wrong": [False] * 4, "longer": [True] * 2}
    with policy_of("ffn-skip:threshold=-1,first=1,last=0,warmup=0").attach(model, anatomy):
        assert all(exact(model, asked["copied"]))
        assert answers_step_by_step(model, asked) != found


def calibration_ids() -> list[list[int]]:
    lengths = (20, 20, 9, 14)
    return [torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]


def _greedy(model: Any, ids: tuple[int, ...], new: int = 3) -> list[int]:
    row = torch.tensor([ids])
    out = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=new, do_sample=False, pad_token_id=0)
    return out[0, len(ids) :].tolist()  # type: ignore[no-any-return]


def test_the_dial_is_turned_no_further_than_it_must() -> None:
    """FLOPs are (threshold + 1) / 2; below 0.2 the model cannot be run."""

    def flops(policy: Policy) -> float:
        threshold: float = policy.threshold  # type: ignore[attr-defined]
        if threshold < 0.2:
            raise InputError("too far")
        return (threshold + 1) / 2

    found = turned_to(policy_of("ffn-skip:span=3"), 0.9, flops)
    assert 0.8 - 2 / 2**4 < found.threshold <= 0.8  # type: ignore[attr-defined]
    assert found.span == 3  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="never costs as little as 30%"):
        turned_to(policy_of("ffn-skip"), 0.3, flops)
    with pytest.raises(InputError, match="no dial"):
        turned_to(policy_of("chain"), 0.3, flops)


def test_text_is_not_judged_that_dials_were_turned_on(tiny_lm: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    seen: Windows = calibration("builtin", tokenizer, tokens=24, length=12, seed=0)
    for _, text in evaluation("builtin", tokenizer, tokens=36, length=12, seed=0):
        rows = {tuple(row) for row in text.ids.tolist()}
        assert rows.isdisjoint(tuple(row) for row in seen.ids.tolist())
