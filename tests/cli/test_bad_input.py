"""Bad input, through the real recipes: exit code 2, one line that names the thing, and nothing written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer
from families import build, unsupported
from safetensors.torch import load_file, save_file
from terminal import billhook

from billhook.plan.plan import Plan, Provenance

Copy = Callable[[], Path]
READERS = ("inspect", "compress", "apply", "eval", "bench", "generate")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in; the cache lies elsewhere."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("BILLHOOK_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def copy(tiny_lm: Path, here: Path) -> Copy:
    """A model of one's own to damage."""
    return lambda: Path(shutil.copytree(tiny_lm, here / "model"))


def refused(arguments: list[object], *named: str) -> str:
    before = _tree()
    result = billhook(*arguments)
    assert result.exit_code == 2, result.output or result.exception
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("billhook: error: ")
    for word in named:
        assert word in lines[0], lines[0]
    assert result.stdout == ""
    assert _tree() == before, "something was written"
    return lines[0]


def _tree() -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in Path.cwd().rglob("*")}


def compress(model: object, *more: object, budget: str = "params=0.8", out: object = "out") -> list[object]:
    return ["compress", model, "--budget", budget, "--out", out, *more]


def apply(model: object, plan: Plan | str, *more: object) -> list[object]:
    text = plan if isinstance(plan, str) else plan.dumps()
    Path("plan.json").write_text(text)
    return ["apply", model, "plan.json", "--out", "out", *more]


def reading(command: str, model: object) -> list[object]:
    """A command on a model that it cannot use."""
    return {
        "inspect": ["inspect", model, "--out", "out"],
        "compress": compress(model),
        "apply": apply(model, Plan.of(["decoder.1"])),
        "eval": ["eval", model],
        "bench": ["bench", model, "--against", model],
        "generate": ["generate", model, "Why?"],
    }[command]


# the model


@pytest.mark.parametrize("command", READERS)
def test_a_model_that_does_not_exist(command):
    refused(reading(command, "no/such/model/anywhere"), "no/such/model/anywhere")


@pytest.mark.parametrize("command", READERS)
def test_truncated_safetensors(copy, command):
    weights = copy() / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    refused(reading(command, "model"), "model.safetensors")


@pytest.mark.parametrize("command", READERS)
def test_nan_in_the_weights(copy, command):
    path = copy() / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if "layers.2" in name)
    tensors[name].view(-1)[3] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    refused(reading(command, "model"), name, "NaN")


def test_a_folder_without_a_model(here):
    (here / "empty").mkdir()
    refused(compress("empty"), "empty", "config.json")


def test_weights_only_as_a_pickle(copy):
    folder = copy()
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    refused(compress("model"), "pytorch_model.bin", "pickle")


def test_a_gguf_file_that_is_none(here):
    (here / "model.gguf").write_text("not a model")
    refused(compress("model.gguf"), "model.gguf", "not a GGUF file")


def test_an_unsupported_family_says_what_was_not_found(here):
    unsupported().save_pretrained(here / "model")
    make_tokenizer(vocab_size=300).save_pretrained(here / "model")
    refused(compress("model"), "no list of blocks", "attention")


@pytest.mark.parametrize("command", ["inspect", "compress", "eval", "generate"])
def test_a_tokenizer_that_does_not_fit(copy, command):
    make_tokenizer(vocab_size=400).save_pretrained(copy())
    refused(reading(command, "model"), "tokenizer", "0 to 299")


@pytest.mark.parametrize("command", ["compress", "eval", "generate"])
def test_no_tokenizer_at_all(copy, command):
    for path in copy().glob("*token*"):
        path.unlink()
    refused(reading(command, "model"), "tokenizer")


def test_a_device_that_is_none(tiny_lm):
    refused(compress(tiny_lm, "--device", "warp"), "device", "warp")


# the budget


@pytest.mark.parametrize("amount", ["0", "1", "1.5", "-3", "much", "nan", "inf", "", "0.5%", "0.8x"])
def test_an_impossible_budget(tiny_lm, amount):
    refused(compress(tiny_lm, budget=f"params={amount}"), "params", "0.8")


@pytest.mark.parametrize("budget", ["0.8", "nonsense", "weight=0.8", "params=0.8,params=0.7", "latency=2", ",", ""])
def test_a_budget_that_is_none(tiny_lm, budget):
    refused(compress(tiny_lm, budget=budget), "budget")


def test_a_budget_that_asks_for_no_reduction(tiny_lm):
    refused(compress(tiny_lm, budget="params=9B"), "params=9B", "no reduction")


def test_a_budget_that_no_plan_reaches(tiny_lm):
    refused(compress(tiny_lm, budget="params=0.0001"), "params=0.0001")


# the plan


def test_a_plan_that_does_not_exist(tiny_lm):
    refused(["apply", tiny_lm, "no-plan.json", "--out", "out"], "no-plan.json")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "JSON"),
        ("[]", "plan"),
        ('{"edits": [{"kind": "drop", "unit": "decoder.x"}]}', "decoder.x"),
        ('{"edits": [{"kind": "melt", "unit": "decoder.1"}]}', "drop"),
        ('{"layers": [1]}', "layers"),
        ('{"schema_version": 99}', "99"),
    ],
)
def test_a_file_that_is_no_plan(tiny_lm, text, named):
    refused(apply(tiny_lm, text), "plan.json", named)


@pytest.mark.parametrize("unit", ["decoder.99", "encoder.0", "decoder.1.cross_attention"])
def test_an_address_that_is_not_in_the_model(tiny_lm, unit):
    refused(apply(tiny_lm, Plan.of([unit])), unit, "decoder.0 to decoder.4")


def test_a_plan_that_leaves_nothing(tiny_lm):
    refused(apply(tiny_lm, Plan.of([f"decoder.{i}" for i in range(5)])), "decoder", "at least one")


def test_a_plan_that_drops_nothing(tiny_lm):
    refused(apply(tiny_lm, Plan()), "nothing")


def test_a_plan_of_another_model(tiny_lm):
    plan = Plan.of(["decoder.1"]).model_copy(update={"provenance": Provenance(model="0" * 64)})
    refused(apply(tiny_lm, plan), "another model")


@pytest.mark.parametrize(
    ("unit", "target", "named"),
    [("decoder.1.mlp", "uniform", "whole blocks"), ("decoder.0.attention", "deci", "first block")],
)
def test_a_plan_that_its_target_cannot_carry(tiny_lm, unit, target, named):
    refused(apply(tiny_lm, Plan.of([unit]), "--target", target), unit, target, named)


def test_a_target_that_the_family_cannot_have(here):
    build("gpt2").save_pretrained(here / "model")
    refused(apply("model", Plan.of(["decoder.1"]), "--target", "deci"), "deci")


# the recipe


def test_a_recipe_that_does_not_exist(tiny_lm):
    refused(compress(tiny_lm, "--recipe", "magic"), "recipe", "magic")


@pytest.mark.parametrize("text", ["- [", "just words", "search: {name: magic}\n"])
def test_a_file_that_is_no_recipe(tiny_lm, here, text):
    (here / "own.yaml").write_text(text)
    refused(compress(tiny_lm, "--recipe", "own.yaml"), "own.yaml")


def test_a_recipe_over_sublayers_for_the_target_uniform_is_refused_before_the_search(tiny_lm, monkeypatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the calibration has begun")

    monkeypatch.setattr("billhook.recipes.compress.calibration_text", never)
    refused(compress(tiny_lm, "--recipe", "sublayer-greedy", "--target", "uniform"), "uniform", "sublayer")


# the text


def test_an_empty_calibration_text(tiny_lm, here):
    (here / "empty.txt").touch()
    refused(compress(tiny_lm, "--calibration", "empty.txt"), "empty.txt")


def test_a_calibration_text_that_is_too_short(tiny_lm, here):
    (here / "short.txt").write_text("A short text.")
    refused(compress(tiny_lm, "--calibration", "short.txt"), "short.txt")


@pytest.mark.parametrize("name", ["missing.txt", "a/b/c/d.txt.gz"])
def test_a_calibration_text_that_does_not_exist(tiny_lm, name):
    refused(compress(tiny_lm, "--calibration", name), name)


def test_a_calibration_text_that_is_damaged(tiny_lm, here):
    (here / "text.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    refused(compress(tiny_lm, "--calibration", "text.jsonl"), "text.jsonl")


# the length


def test_more_new_tokens_than_the_model_has_positions(tiny_lm, monkeypatch):
    refused(["generate", tiny_lm, "Why?", "--max-new-tokens", 600], "max_new_tokens is 600", "512 positions", "at most")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the search has begun")

    monkeypatch.setattr("billhook.recipes.compress.find", never)
    refused(compress(tiny_lm, "--max-new-tokens", 600), "max_new_tokens is 600", "512 positions", "at most")


@pytest.mark.parametrize("amount", [0, -1])
def test_no_new_tokens(tiny_lm, amount):
    refused(["generate", tiny_lm, "Why?", "--max-new-tokens", amount], "--max-new-tokens")
    refused(compress(tiny_lm, "--max-new-tokens", amount), "--max-new-tokens")


# the place


def test_an_existing_target_is_kept(tiny_lm, copy):
    copy().rename("out")
    refused(compress(tiny_lm), "out", "--overwrite")
    refused(apply(tiny_lm, Plan.of(["decoder.1"])), "out", "--overwrite")
    refused(["inspect", tiny_lm, "--out", "out"], "out", "--overwrite")


def test_a_folder_that_holds_something_else_is_kept_even_with_overwrite(tiny_lm, here):
    (here / "out").mkdir()
    (here / "out" / "thesis.txt").write_text("years of work")
    refused(compress(tiny_lm, "--overwrite"), "out", "something other than a model")


@pytest.mark.parametrize("out", ["model", "model/../model", "."])
def test_the_model_that_is_read_is_never_replaced(copy, here, out):
    shutil.copy(copy() / "config.json", here)  # the folder above could pass for a model, too
    refused(compress("model", "--overwrite", out=out), "holds the model")
    refused(["inspect", "model", "--out", out, "--overwrite"], "holds the model")
    Path("plan.json").write_text(Plan.of(["decoder.1"]).dumps())
    refused(["apply", "model", "plan.json", "--out", out, "--overwrite"], "holds the model")


def test_a_target_below_a_file(tiny_lm, here):
    (here / "file").touch()
    refused(compress(tiny_lm, out="file/out"), "file/out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_target_that_is_read_only(tiny_lm, here):
    (here / "locked").mkdir(mode=0o555)
    refused(compress(tiny_lm, out="locked/out"), "locked", "not writable")


# the comparison


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_a_dense_model_that_does_not_exist(tiny_lm, command):
    refused([command, tiny_lm, "--against", "no/such/model/anywhere"], "no/such/model/anywhere")


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_models_that_differ_in_vocabulary(tiny_lm, copy, command):
    make_tokenizer(vocab_size=290).save_pretrained(copy())
    refused([command, tiny_lm, "--against", "model"], "vocabular")


def test_the_folders_above_the_target_are_not_made_either(tiny_lm):
    refused(compress(tiny_lm, budget="params=7", out="deep/er/out"), "params=7")


@pytest.mark.parametrize("text", ["{", '{"x": 1}'])
@pytest.mark.parametrize("command", ["eval", "bench"])
def test_a_damaged_record_beside_the_model(tiny_lm, copy, command, text):
    (copy() / "billhook.json").write_text(text)
    refused([command, "model", "--against", tiny_lm], "billhook.json")


def test_a_process_of_its_own_says_no_more_than_that(copy):
    """Nothing of the libraries' own warnings joins the line."""
    os.truncate(copy() / "model.safetensors", 1000)
    command = [sys.executable, "-c", "from billhook.cli import main; main()", *map(str, compress("model")), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "model.safetensors" in done.stderr
    assert [path.name for path in Path.cwd().iterdir()] == ["model"]
