"""The commands for real, on a tiny model: what one writes the next one reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from terminal import billhook
from transformers import AutoModelForCausalLM

from billhook.data.questions import PROBES
from billhook.plan.plan import Plan
from billhook.plan.record import Run

RESULTS = [("block-influence", "uniform"), ("sublayer-greedy", "remote")]


def answer(*arguments: object) -> dict[str, Any]:
    """The JSON object that a command prints."""
    result = billhook(*arguments, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    assert all(line.startswith("billhook: ") and " of " in line for line in result.stderr.splitlines())  # how far it is
    return json.loads(result.stdout)


def record(content: dict[str, Any]) -> Run:
    """The part of it that is the record of the run."""
    return Run.model_validate({k: v for k, v in content.items() if k not in ("block_token_forwards", "paths")})


@pytest.fixture(scope="module", params=RESULTS, ids="-".join)
def compressed(request, tiny_lm, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    recipe, target = request.param
    out = tmp_path_factory.mktemp("compressed") / "out"
    content = answer(
        "compress", tiny_lm, "--budget", "params=0.7", "--out", out, "--recipe", recipe, "--target", target,
        "--heal", "none", "--max-new-tokens", 6,
    )  # fmt: skip
    return out, content


def test_compress_reports_what_was_asked_got_and_measured(compressed):
    out, content = compressed
    run = record(content)
    assert run.asked == "params=0.7"
    assert 0 < run.realised["params"] <= 0.7
    assert {text.domain for text in run.evidence} == {"calibration", "other"}
    assert [probe.name for probe in run.probes] == list(PROBES)
    assert all(g.repeated_dense is not None and g.repeated_compressed is not None for g in run.generations)
    assert set(run.seconds) >= {"evidence", "probes", "generations", "bench"}
    assert len(run.timings) == 3
    assert run.generations and run.seconds
    assert content["block_token_forwards"] == run.search.work > 0
    assert set(content["paths"]) == {"out", "report", "card", "record"}
    assert run.plan == Plan.read(out)


def test_what_compress_wrote_is_what_it_printed(compressed):
    out, content = compressed
    assert Run.model_validate_json((out / "billhook.json").read_text()) == record(content)
    assert not [path for path in out.parent.iterdir() if path != out]  # nothing is left beside it


def test_transformers_loads_the_result(compressed, tiny_lm):
    out, content = compressed
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=content["plan"]["target"] == "remote")
    cost = content["costs"]["params"]
    kept = sum(p.numel() for p in model.parameters())
    dense = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_lm).parameters())
    assert dense - kept == cost["dense"] - cost["compressed"]


def test_apply_makes_the_same_checkpoint_from_the_plan(compressed, tiny_lm, tmp_path):
    out, content = compressed
    again = tmp_path / "again"
    run = record(answer("apply", tiny_lm, out / "billhook.json", "--out", again))
    assert run.plan.drops == record(content).plan.drops
    assert run.costs["params"].compressed == content["costs"]["params"]["compressed"]
    assert _tensors(again) == _tensors(out)


def test_apply_says_which_weights_it_leaves_out(tiny_lm, tmp_path):
    model = Path(shutil.copytree(tiny_lm, tmp_path / "model"))
    weights = load_file(model / "model.safetensors") | {"extra_head.weight": torch.ones(2, 2)}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "plan.json").write_text(Plan.of(["decoder.1"]).dumps())
    result = billhook("apply", model, tmp_path / "plan.json", "--out", tmp_path / "out")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "left out  extra_head.weight" in result.stdout
    assert "extra_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert Run.model_validate_json((tmp_path / "out" / "billhook.json").read_text()).environment == {
        "weights left out": "extra_head.weight"
    }


def test_eval_against_the_dense_model(compressed, tiny_lm):
    out, content = compressed
    run = record(answer("eval", out, "--against", tiny_lm))
    mine = {t.name: t.perplexity_compressed.value for t in run.evidence}
    theirs = {t["name"]: t["perplexity_compressed"]["value"] for t in content["evidence"]}
    assert mine == pytest.approx(theirs, rel=1e-4)
    assert [(p.name, p.items) for p in run.probes] == [(p["name"], p["items"]) for p in content["probes"]]


def test_eval_alone(compressed):
    out, _ = compressed
    result = billhook("eval", out)
    assert result.exit_code == 0
    assert "perplexity" in result.stdout and "dense" not in result.stdout
    assert not record(answer("eval", out)).probes


def test_bench(compressed, tiny_lm):
    out, _ = compressed
    run = record(answer("bench", out, "--against", tiny_lm))
    assert [t.workload.batch for t in run.timings] == [1, 1, 8]
    assert all(t.dense_tokens_per_second > 0 and t.compressed_tokens_per_second > 0 for t in run.timings)


def test_generate_is_greedy_and_repeats(compressed):
    out, content = compressed
    said = [answer("generate", out, content["generations"][0]["prompt"], "--max-new-tokens", 6) for _ in range(2)]
    assert said[0]["text"] == said[1]["text"] == content["generations"][0]["compressed"]


def test_the_tables_for_people_and_the_target_any(tiny_lm, tmp_path):
    out = tmp_path / "out"
    result = billhook("compress", tiny_lm, "--budget", "params=0.7", "--out", out, "--target", "any")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "perplexity" in result.stdout and "params=0.7" in result.stdout
    assert f'billhook.load("{out}")' in result.stdout
    assert max(len(line) for line in result.stdout.splitlines() if str(tmp_path) not in line) <= 80
    assert billhook("generate", out, "Why?", "--max-new-tokens", 2).exit_code == 0


def test_overwrite_replaces_an_earlier_result_by_the_same(compressed, tiny_lm):
    """The same command again finds the same plan; without --overwrite it is refused (test_bad_input)."""
    out, content = compressed
    plan = content["plan"]
    (out / "mark").touch()
    again = answer(
        "compress", tiny_lm, "--budget", "params=0.7", "--out", out, "--recipe", plan["provenance"]["recipe"],
        "--target", plan["target"], "--heal", "none", "--max-new-tokens", 6, "--overwrite",
    )  # fmt: skip
    assert again["plan"] == plan
    assert not (out / "mark").exists()


def test_inspect_changes_nothing_and_measures_every_part(tiny_lm, tmp_path):
    content = answer("inspect", tiny_lm, "--out", tmp_path / "out")
    run = record(content)
    assert not run.plan.edits
    units = {unit for values in run.measures.scores.values() for unit in values}
    assert {f"decoder.{i}{part}" for i in range(5) for part in ("", ".attention", ".mlp")} <= units
    assert Path(content["paths"]["report"]).is_file()


def _tensors(folder: Path) -> dict[str, int]:
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    return {
        name: hash(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for file in files
        for name, tensor in load_file(file).items()
    }
