"""Every command: what it hands to its recipe and what it prints, with the recipes replaced."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from report.example import comparison, example_run, healed_run, inspection, two_stacks
from terminal import billhook, fake_recipe

from billhook.plan.record import Interval, Run
from billhook.plan.target import Target
from billhook.recipes.catalogue import load
from billhook.recipes.generate import Answer

RUN = example_run()
COMMANDS = {
    "inspect": ["inspect", "demo"],
    "compress": ["compress", "demo", "--budget", "params=0.8", "--out", "out"],
    "heal": ["heal", "out", "--out", "better"],
    "restore": ["restore", "tuned", "--base", "demo", "--out", "out"],
    "apply": ["apply", "demo", "plan.json", "--out", "out"],
    "evaluate": ["eval", "out", "--against", "demo"],
    "bench": ["bench", "out", "--against", "demo"],
    "generate": ["generate", "out", "Why?"],
}
SHARED = ["--json", "--seed", "--dtype", "--device", "--trust-remote-code"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_option_and_an_example_within_80_columns(name):
    result = billhook(COMMANDS[name][0], "--help")
    assert result.exit_code == 0
    assert all(option in result.stdout for option in SHARED)
    assert f"Example: billhook {COMMANDS[name][0]}" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    "words",
    [
        "compare", "stack", "unstack", "tune-policy", "recipes", "recipes show", "policies", "policies explain",
        "policies compare",
    ],
)  # fmt: skip
def test_help_of_the_other_commands_has_an_example_within_80_columns(words):
    result = billhook(*words.split(), "--help")
    assert result.exit_code == 0
    assert f"Example: billhook {words}" in " ".join(result.stdout.split())
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize("words", ["inspect", "compress", "compare", "heal", "apply", "policies", "policies compare"])
def test_paragraphs_of_the_help_flow(words):
    """Each line is as full as it can be: the next one's first word had no room."""
    prose = billhook(*words.split(), "--help").stdout.split("Usage:")[1].split("╭")[0]
    lines = [line.strip() for line in prose.splitlines()]
    for line, following in pairwise(lines):
        if line and following:
            assert len(f"{line} {following.split()[0]}") > 77, line


def test_the_help_says_which_folder_is_meant_and_what_is_generated():
    def shown_by(name):
        return " ".join(billhook(name, "--help").stdout.replace("│", " ").split())

    shown = {name: shown_by(name) for name in ("heal", "compress", "generate")}
    assert "any other MODEL will do" in shown["generate"] and "any other MODEL" not in shown["heal"]
    assert "A cut model that Billhook wrote." in shown["heal"]
    assert all("Tokens of each sample answer" in shown[name] for name in ("heal", "compress"))
    assert "Tokens to generate." in shown["generate"]


def test_the_interface_is_the_one_that_scripts_rely_on():
    expected = {
        "inspect": ["--calibration", "--out", "--overwrite"],
        "compress": [
            "--budget",
            "--out",
            "--calibration",
            "--target",
            "--recipe",
            "--heal",
            "--overwrite",
            "--max-new-tokens",
        ],
        "heal": [
            "--out",
            "--method",
            "--against",
            "--calibration",
            "--select",
            "--tokens",
            "--max-new-tokens",
            "--overwrite",
        ],
        "restore": ["--base", "--recipe", "--out", "--calibration", "--max-new-tokens", "--overwrite"],
        "apply": ["--out", "--target", "--overwrite"],
        "eval": ["--against", "--calibration"],
        "bench": ["--against"],
        "generate": ["--max-new-tokens"],
    }
    for command, options in expected.items():
        shown = billhook(command, "--help").stdout
        assert all(option in shown for option in options), command


@pytest.mark.parametrize("name", COMMANDS)
def test_a_seed_is_handed_on_or_the_help_says_that_it_changes_nothing(monkeypatch, name):
    calls = fake_recipe(monkeypatch, name, Answer("text") if name == "generate" else RUN)
    billhook(*COMMANDS[name], "--seed", 7)
    shown = " ".join(billhook(name, "--help").stdout.split())
    dead = re.search(r"--seed(, --dtype and --device)? changes? nothing", shown)
    assert ("seed" in calls[0].__dict__) == (dead is None)
    assert calls[0].__dict__.get("seed", 7) == 7


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "generate"])
def test_json_is_one_object_that_holds_the_whole_record(monkeypatch, name):
    fake_recipe(monkeypatch, name, RUN)
    result = billhook(*COMMANDS[name], "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    content = json.loads(result.stdout)
    assert content.pop("block_token_forwards") == RUN.search.work
    content.pop("paths")
    assert Run.model_validate(content) == RUN


def test_json_of_generate_has_the_text(monkeypatch):
    fake_recipe(monkeypatch, "generate", Answer("Because of [Rayleigh] scattering."))
    content = json.loads(billhook("generate", "out", "Why?", "--json", "--max-new-tokens", 7).stdout)
    assert content["text"] == "Because of [Rayleigh] scattering."
    assert (content["prompt"], content["max_new_tokens"]) == ("Why?", 7)


def test_generate_prints_the_text_as_it_is(monkeypatch):
    fake_recipe(monkeypatch, "generate", Answer("[bold]x[/] :smile: " + "long " * 40))
    assert billhook("generate", "out", "Why?").stdout == "[bold]x[/] :smile: " + "long " * 40 + "\n"


def test_a_model_cannot_steer_the_terminal(monkeypatch):
    fake_recipe(monkeypatch, "generate", Answer("red \x1b[31m and\n a\x07 bell"))
    assert billhook("generate", "out", "Why?").stdout == "red \ufffd[31m and\n a\ufffd bell\n"
    assert json.loads(billhook("generate", "out", "Why?", "--json").stdout)["text"] == "red \x1b[31m and\n a\x07 bell"


def test_json_has_null_where_a_figure_is_not_finite(monkeypatch):
    fake_recipe(monkeypatch, "compress", RUN.model_copy(update={"realised": {"params": float("nan")}}))
    assert json.loads(billhook(*COMMANDS["compress"], "--json").stdout)["realised"] == {"params": None}


def test_compress_hands_on_everything_it_was_given(monkeypatch):
    calls = fake_recipe(monkeypatch, "compress", RUN)
    billhook(
        "compress", "org/model", "--budget", "size=100MB", "--out", "o", "--recipe", "greedy", "--target", "uniform",
        "--heal", "closed-form",
        "--calibration", "self", "--seed", 3, "--dtype", "bfloat16", "--device", "cuda:1", "--overwrite",
        "--trust-remote-code", "--max-new-tokens", 9,
    )  # fmt: skip
    (call,) = calls
    assert callable(call.__dict__.pop("progress"))
    assert call.__dict__ == {
        "positional": ("org/model",), "budget": "size=100MB", "out": Path("o"), "recipe": "greedy",
        "heal": "closed-form", "select": "none", "target": Target.UNIFORM, "prior": None,
        "calibration": "self", "seed": 3, "dtype": "bfloat16", "device": "cuda:1",
        "overwrite": True, "trust_remote_code": True, "max_new_tokens": 9,
    }  # fmt: skip


def test_heal_hands_on_everything_it_was_given(monkeypatch):
    calls = fake_recipe(monkeypatch, "heal", RUN)
    billhook(
        "heal", "out", "--out", "o", "--method", "lora", "--against", "org/model", "--calibration", "self",
        "--select", "dsir:law.txt", "--tokens", 200000, "--seed", 3, "--dtype", "bfloat16", "--device", "cuda:1",
        "--overwrite", "--trust-remote-code", "--max-new-tokens", 9,
    )  # fmt: skip
    (call,) = calls
    assert callable(call.__dict__.pop("progress"))
    assert call.__dict__ == {
        "positional": ("out",), "out": Path("o"), "method": "lora", "against": "org/model", "calibration": "self",
        "select": "dsir:law.txt", "tokens": 200000, "seed": 3, "dtype": "bfloat16", "device": "cuda:1",
        "overwrite": True, "trust_remote_code": True, "max_new_tokens": 9,
    }  # fmt: skip


def test_compare_hands_the_healing_on_and_shows_it(monkeypatch):
    plain = comparison()
    entries = tuple(entry.model_copy(update={"healed": entry.evidence}) for entry in plain.entries)
    found = plain.model_copy(update={"entries": entries, "heal": "closed-form"})
    calls = fake_recipe(monkeypatch, "compare", found)
    shown = billhook("compare", "m", "--budget", "params=0.9", "--out", "o", "--heal", "closed-form").stdout
    assert calls[0].heal == "closed-form"
    assert "healed" in shown
    calls = fake_recipe(monkeypatch, "compare", plain)
    assert "healed" not in billhook("compare", "m", "--budget", "params=0.9", "--out", "o").stdout
    assert calls[0].heal == "none"


def test_compare_fills_a_table_while_it_works(monkeypatch):
    """On standard error: a heading, then a row with each result, within 80 columns where nothing was refused."""
    found = comparison()
    met = next(e for e in found.entries if e.recipe == "random" and e.evidence)
    healed = found.entries[0].model_copy(update={"healed": found.entries[0].evidence})

    def walk(*args, told, **rest):
        for entry in (met, healed, found.entries[-1]):
            told(entry)
        return found

    monkeypatch.setattr(importlib.import_module("billhook.recipes.compare"), "compare", walk)
    heading, *rows = billhook("compare", "m", "--budget", "params=0.9", "--out", "o").stderr.splitlines()
    assert heading.split() == ["method", "budget", "×", "perplexity", "answers", "block-tokens"]
    assert rows[0].split() == ["random", "(seed", "0)", "params=0.9", "3.15", "20.8%", "92,160"]
    assert "1.48 (1.48 cut)" in rows[1] and rows[1].split()[-1] == "3,000,000"
    assert rows[2].endswith("budget params=0.8 cannot be met")
    assert {len(heading), len(rows[0]), len(rows[1])} == {78}


def test_what_compare_tells_fits_80_columns(monkeypatch):
    """Long names, a long reason and what is damaged a million times, as cut and healed."""
    plain = comparison()
    reason = " ".join(["budget params=0.8 cannot be met:", *["so much cannot go"] * 12])
    long = next(e for e in plain.entries if e.recipe == "random" and e.evidence)
    long = long.model_copy(update={"recipe": "random-channels", "repeated": (0.1, 1.0)})
    names = [long.model_copy(update={"seed": seed}) for seed in (0, 1)]
    refused = plain.entries[-1].model_copy(update={"refused": reason})
    ratio = Interval(value=4e6, low=3e6, high=5e6)
    broken = long.model_copy(
        update={"evidence": tuple(text.model_copy(update={"perplexity_ratio": ratio}) for text in long.evidence)}
    )
    for heal, entries in {
        "none": (*plain.entries[:-1], *names, broken, refused),
        "closed-form": tuple(e.model_copy(update={"healed": e.evidence}) for e in (*plain.entries[:-1], *names)),
    }.items():
        found = plain.model_copy(update={"entries": entries, "heal": heal})

        def walk(*args, told, found=found, **rest):
            for entry in found.entries:
                told(entry)
            return found

        monkeypatch.setattr(importlib.import_module("billhook.recipes.compare"), "compare", walk)
        result = billhook("compare", "m", "--budget", "params=0.9", "--out", "o")
        live = result.stderr.splitlines()
        assert max(map(len, live)) <= 80
        assert any(line.startswith("random-channels (seed 0) params=0.9 ") for line in live)
        tables = result.stdout.partition("Use ")[0]
        assert "…" not in tables and max(map(len, tables.splitlines())) <= 80
        assert {"docstrings", "answers", "4-grams", "passes"} <= set(tables.split())
        if heal == "none":
            assert reason in " ".join(" ".join(live).split())


def test_the_words_for_healing_are_those_of_the_methods():
    from billhook.heal.training.methods import METHODS
    from billhook.plan.heals import TRAINED
    from billhook.recipes.settings import TRAINING_TOKENS

    assert set(TRAINED) == set(METHODS)
    assert f"[default: {TRAINING_TOKENS}]" in " ".join(billhook("heal", "--help").stdout.split())


def test_dtype_auto_is_none_below(monkeypatch):
    calls = fake_recipe(monkeypatch, "bench", RUN)
    billhook("bench", "out", "--against", "demo")
    assert calls[0].dtype is None


def test_paths_are_absolute_and_only_of_what_exists(monkeypatch, tmp_path):
    fake_recipe(monkeypatch, "compress", RUN)
    (tmp_path / "report.html").touch()
    result = billhook("compress", "demo", "--budget", "params=0.8", "--out", tmp_path, "--json")
    assert json.loads(result.stdout)["paths"] == {"out": str(tmp_path), "report": str(tmp_path / "report.html")}


def test_compress_prints_a_table_that_fits_80_columns(monkeypatch, tmp_path):
    fake_recipe(monkeypatch, "compress", RUN)
    for name in ("report.html", "README.md", "billhook.json"):
        (tmp_path / name).touch()
    result = billhook("compress", "demo", "--budget", "params=0.8", "--out", tmp_path)
    lines = result.stdout.splitlines()
    for expected in ("block parameters", "22.8", "51.9", "TinyStories", "60.3% same next token", "decode, batch 8",
                     "attention 12 24 27–28 · MLP 11 19 21 · blocks 13 22 25", "params=0.8", "79.2% of params",
                     "4,331,520 block-token forwards", "The lighthouse keeper", "small, small",
                     "exact answers", "75.0%", "−71 (−90 to −51)", "repeated 4-grams"):  # fmt: skip
        assert any(expected in line for line in lines), expected
    folder = str(tmp_path)
    assert all(len(line) <= 80 for line in lines if folder not in line)
    assert f"{folder}/report.html  the pictures; open it in a browser" in lines
    assert any(f'from_pretrained("{folder}", trust_remote_code=True)' in line for line in lines)


def test_heal_says_what_it_brought_and_not_what_an_earlier_search_took(monkeypatch):
    fake_recipe(monkeypatch, "heal", healed_run())
    shown = billhook("heal", "out", "--out", "better").stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert "KL 1.48 → 1.03 → 1.12." in shown and "block-token forwards" not in shown
    assert "\n          Nearer to the text, further from the dense model: KL 0.712 → 0.851." in shown
    assert "healed    closed-form, then lora; on TinyStories: perplexity 35.6 (cut and not" in shown


def test_eval_without_a_dense_model_compares_nothing(monkeypatch):
    fake_recipe(monkeypatch, "evaluate", RUN)
    shown = billhook("eval", "out").stdout
    assert "22.8" in shown
    assert "51.9" not in shown and "compressed" not in shown


def test_inspect_draws_a_bar_for_every_block(monkeypatch):
    fake_recipe(monkeypatch, "inspect", inspection())
    shown = billhook("inspect", "demo").stdout
    bars = [line for line in shown.splitlines() if "█" in line]
    assert len(bars) == 5  # one score over blocks, two over both sublayers
    assert all(sum(c in "▁▂▃▄▅▆▇█" for c in line) == 30 for line in bars)
    lowest = min(inspection().measures.scores["block_influence"].items(), key=lambda item: item[1])[0]
    assert f"least {lowest.removeprefix('decoder.')} " in shown


def test_every_table_can_do_without_what_was_not_measured(monkeypatch):
    fake_recipe(monkeypatch, "apply", two_stacks())
    result = billhook("apply", "org/translator", "plan.json", "--out", "out")
    assert result.exit_code == 0
    assert "decoder cross-attention 2" in result.stdout


def test_help_is_there_at_once():
    """The heavy libraries are imported by the commands that need them, when they run."""
    code = (
        "import billhook.cli, sys; print(sorted({'torch', 'transformers', 'pydantic', 'plotly'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_python_runs_it_as_a_module():
    done = subprocess.run([sys.executable, "-m", "billhook", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("billhook ")


def test_what_was_realised_is_shown_where_no_amount_was_asked(monkeypatch):
    fake_recipe(monkeypatch, "compress", RUN.model_copy(update={"asked": "until=cliff"}))
    shown = " ".join(billhook(*COMMANDS["compress"]).stdout.split())
    assert "asked until=cliff realised 79.2% of params" in shown


def test_recipes_are_listed_with_their_papers():
    shown = billhook("recipes").stdout
    listed = json.loads(billhook("recipes", "--json").stdout)["recipes"]
    assert {"sublayer-greedy", "block-influence", "random"} <= {recipe["name"] for recipe in listed}
    for recipe in listed:
        assert recipe["name"] in shown
        assert recipe["paper"] is None or recipe["paper"]["citation"].split(" ")[0] in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_recipe_that_is_shown_is_one_to_start_from(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(billhook("recipes", "show", "block-influence").stdout)
    assert load(own) == load("block-influence")


def test_the_list_says_what_a_method_drops_needs_and_costs():
    rows = {line.split()[0]: line for line in billhook("recipes").stdout.splitlines() if line.strip()}
    assert all(word in rows["name"] for word in ("paper", "units", "needs", "passes"))
    assert " ".join(rows["attention-drop"].split()) == "attention-drop He et al. 2024 attention data 2"
    assert rows["fisher-width"].split()[-2:] == ["gradients", "3"]
    assert rows["evenly-spaced"].split() == ["evenly-spaced", "block", "nothing", "0"]


def test_what_is_shown_is_explained_below():
    shown = billhook("recipes", "show", "joint-drop").stdout
    comments = [line for line in shown.splitlines() if line.startswith("#")]
    assert comments[0] == "# unit sublayer: An attention or an MLP, each by itself."
    assert comments[1].startswith("# score block-influence: 1 - E[cos(x, y)]")
    assert any(line.startswith("# choice one-shot: Rank once by the score") for line in comments)
    assert max(map(len, comments)) <= 80
    assert shown.splitlines()[-len(comments) :] == comments, "nothing but comments follows the recipe"


def test_a_file_of_the_users_own_is_shown_as_it_is(tmp_path):
    """Also under the name of a recipe that comes along."""
    own = tmp_path / "own.yaml"
    own.write_text("name: block-influence\ntitle: Own\nunit: mlp\nobjective: kl\nchoice: {word: greedy, refine: 0.5}\n")
    shown = billhook("recipes", "show", own).stdout
    assert shown.startswith(own.read_text())
    assert "# unit mlp: " in shown and "refine: exchanges afterwards" in " ".join(shown.split())


@pytest.mark.parametrize("name", ["magic", "../../../etc/passwd", "absent.yaml"])
def test_a_recipe_that_is_not_there_cannot_be_shown(name):
    result = billhook("recipes", "show", name)
    assert result.exit_code == 2
    assert name in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(("typed", "offered"), [("--recipe block-i", "block-influence"), ("--target de", "deci")])
def test_the_shell_completes(typed, offered):
    variables = {"_TYPER_COMPLETE_ARGS": f"billhook compress {typed}", "_BILLHOOK_COMPLETE": "complete_zsh"}
    code = "import sys; sys.argv = ['billhook']; from billhook.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | variables, check=False
    )
    assert f'"{offered}"' in done.stdout


def test_apply_says_that_it_keeps_the_stored_type(monkeypatch):
    fake_recipe(monkeypatch, "apply", RUN)
    assert billhook(*COMMANDS["apply"]).stderr == ""
    assert "keeps the type" in billhook(*COMMANDS["apply"], "--dtype", "float16").stderr


def test_apply_says_that_a_plan_cannot_heal(monkeypatch):
    fake_recipe(
        monkeypatch, "apply", RUN.model_copy(update={"environment": {"not healed": "it lacks the new weights"}})
    )
    assert "note: it lacks the new weights" in billhook(*COMMANDS["apply"]).stderr


def test_version():
    from importlib.metadata import version

    assert billhook("--version").stdout == f"billhook {version('billhook')}\n"
