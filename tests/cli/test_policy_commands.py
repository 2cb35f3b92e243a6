"""The commands on run-time policies, from the arguments to what is printed and written, on a tiny model."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
from terminal import billhook

from billhook.evaluate.generation_speed import generation_speed
from billhook.evaluate.policy_speed import policy_speed
from billhook.runtime.catalogue import POLICIES


def test_policies_are_listed_and_explained() -> None:
    listed = billhook("policies")
    assert listed.exit_code == 0
    assert all(name in listed.stdout for name in POLICIES)
    facts = json.loads(billhook("policies", "--json").stdout)["policies"]
    assert [fact["name"] for fact in facts] == list(POLICIES)
    assert "Runs the blocks of the decoder in the order given" in listed.stdout
    assert max(map(len, listed.stdout.splitlines())) <= 80
    explained = billhook("policies", "explain", "ffn-skip")
    assert "FFN-SkipLLM" in explained.stdout
    assert "threshold" in explained.stdout
    for words in (("explain", "voids", "--json"), ("--json", "explain", "voids")):
        assert json.loads(billhook("policies", *words).stdout)["kv"] == POLICIES["voids"].kv
    wrong = billhook("policies", "explain", "voyds")
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (2, 1)
    assert "there is no policy 'voyds'" in wrong.stderr


@pytest.mark.parametrize("name", POLICIES)
def test_an_explanation_fits_80_columns_and_says_what_is_allowed(name: str) -> None:
    explained = billhook("policies", "explain", name).stdout
    assert max(map(len, explained.splitlines())) <= 80
    described, _, parameters = explained.partition("\nparameter ")
    assert not re.search(r"\S\n[a-z]+\n", described), "a line holds one word: it was broken twice"
    assert [line.split()[0] for line in parameters.splitlines()[1:] if line[:1].strip()] == list(
        POLICIES[name].model_fields
    )
    assert re.search(r"1 to 100|0 to 1|above 0", parameters) or name not in ("even-skip", "first-router", "voids")


def test_generate_under_a_policy(tiny_lm: Path) -> None:
    plain = billhook("generate", tiny_lm, "A billhook", "--max-new-tokens", 4).stdout
    quiet = billhook(
        "generate", tiny_lm, "A billhook", "--max-new-tokens", 4, "--policy", "ffn-skip:threshold=1"
    ).stdout
    loud = billhook("generate", tiny_lm, "A billhook", "--max-new-tokens", 4, "--policy", "chain:blocks=0+0").stdout
    assert quiet == plain != loud


def test_generate_speculating_says_how_it_went(tiny_lm: Path) -> None:
    command = ["generate", tiny_lm, "A billhook", "--max-new-tokens", 12]
    policy = ["--policy", "self-speculation:units=decoder.1+decoder.2.mlp,threshold=0"]
    plain, ours = billhook(*command), billhook(*command, *policy)
    assert ours.stdout == plain.stdout
    assert re.fullmatch(
        r"self-speculation: \d+ of \d+ drafted tokens accepted \([\d.]+%\), [\d.]+ tokens a verification\n", ours.stderr
    )
    assert "self-speculation" not in plain.stderr
    drafting = json.loads(billhook(*command, *policy, "--json").stdout)["drafting"]
    assert 0 <= drafting["accepted"] <= drafting["drafted"] > 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["bench", "MODEL", "--policy", "self-speculation:units=decoder.9"], "decoder.9"),
        (
            ["tune-policy", "MODEL", "--policy", "self-speculation", "--target", "kl<=1", "--out", "p.json"],
            "no threshold",
        ),
        (["bench", "MODEL"], "give either --against MODEL or --policy NAME"),
        (["bench", "MODEL", "--policy", "chain", "--against", "demo"], "give either --against MODEL or --policy NAME"),
        (["bench", "MODEL", "--policy", "static-skip:units=decoder.9"], "decoder.9 of the schedule is not in this"),
        (["generate", "MODEL", "x", "--policy", "even-skip:speedup=0"], "parameter speedup"),
        (["generate", "MODEL", "x", "--policy", ""], "there is no policy ''"),
        (
            ["tune-policy", "MODEL", "--policy", "ffn-skip", "--target", "kl=1", "--out", "p.json"],
            "not of the form kl<=",
        ),
        (["tune-policy", "MODEL", "--policy", "ffn-skip", "--target", "kl<=1", "--out", "p.txt"], "is a .json file"),
        (["tune-policy", "MODEL", "--policy", "chain", "--target", "kl<=1", "--out", "p.json"], "no threshold to tune"),
    ],
)
def test_bad_input_gets_one_line(tiny_lm: Path, arguments: list[str], reason: str) -> None:
    result = billhook(*(str(tiny_lm) if a == "MODEL" else a for a in arguments))
    assert result.exit_code == 2
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1


def test_tuned_written_and_used(tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billhook.recipes.policy.LENGTH", 12)
    monkeypatch.setattr("billhook.recipes.policy.JUDGED_TOKENS", 36)
    monkeypatch.setattr("billhook.recipes.policy.FITTED_TOKENS", 36)
    monkeypatch.setattr("billhook.evaluate.tune_policy.STEPS", 3)
    monkeypatch.setattr("billhook.runtime.voids.GENERATED", 3)
    out = tmp_path / "p.json"
    command = ["tune-policy", tiny_lm, "--policy", "voids:alpha=0.9", "--target", "kl<=0.9", "--out", out]
    result = billhook(*command, "--json")
    assert result.exit_code == 0, result.stderr
    report, written = json.loads(result.stdout), json.loads(out.read_text())
    assert written["policy"] == "voids"
    assert written["parameters"] == report["parameters"]
    assert len(written["parameters"]["prompt"]) == 5
    assert len(written["tuned"]["tried"]) >= 1
    assert {text["domain"] for text in report["evidence"]} == {"calibration", "other"}
    again = billhook(*command)
    assert again.exit_code == 2
    assert "give --overwrite" in again.stderr
    assert billhook("generate", tiny_lm, "A", "--max-new-tokens", 2, "--policy", out).exit_code == 0


def test_bench_under_a_policy(tiny_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billhook.recipes.policy.LENGTH", 64)
    monkeypatch.setattr("billhook.recipes.policy.JUDGED_TOKENS", 640)
    monkeypatch.setattr("billhook.recipes.policy.policy_speed", partial(policy_speed, rounds=2))
    result = billhook("bench", tiny_lm, "--policy", "even-skip:speedup=1.25")
    assert result.exit_code == 0, result.stderr
    assert "blocks run" in result.stdout
    assert "decode, batch 1" in result.stdout
    assert "4.00" in result.stdout


def test_bench_of_self_speculation(tiny_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billhook.recipes.policy.LENGTH", 16)
    monkeypatch.setattr("billhook.recipes.policy.JUDGED_TOKENS", 160)
    monkeypatch.setattr("billhook.recipes.policy.generation_speed", partial(generation_speed, rounds=2))
    result = billhook("bench", tiny_lm, "--policy", "self-speculation:units=decoder.2", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["savings"] is None
    assert report["drafting"]["same_text"] == 1.0
    assert report["drafting"]["drafted"] > 0
    (timing,) = report["timings"]
    assert (timing["workload"]["prompt_tokens"], timing["workload"]["new_tokens"]) == (16, 64)


def test_nothing_but_a_policy_file_is_replaced(tiny_lm: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    for name, reason in (("config.json", "is not of the form"), ("model.json", "does not belong to a policy file")):
        arguments = ["tune-policy", str(tiny_lm), "--policy", "ffn-skip", "--target", "kl<=1", "--overwrite"]
        refused = billhook(*arguments, "--out", str(tmp_path / name))
        assert (refused.exit_code, reason in refused.stderr) == (2, True)
    assert config.read_text() == "{}"
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"
