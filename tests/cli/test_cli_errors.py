"""What becomes of an error: one line for what a user can change, a traceback for what only we can."""

from __future__ import annotations

import errno

import pytest
from report.example import example_run
from terminal import billhook, fake_recipe

from billhook.plan.errors import InputError

COMPRESS = ["compress", "demo", "--budget", "params=0.8", "--out", "out"]


@pytest.mark.parametrize("flag", [[], ["--json"]])
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, flag):
    fake_recipe(monkeypatch, "compress", InputError("budget 'x' is not\nof the form KIND=AMOUNT"))
    result = billhook(*COMPRESS, *flag)
    assert result.exit_code == 2
    assert result.stderr == "billhook: error: budget 'x' is not of the form KIND=AMOUNT\n"
    assert result.stdout == ""


def test_a_long_message_is_not_broken(monkeypatch):
    fake_recipe(monkeypatch, "compress", InputError("word " * 60))
    assert len(billhook(*COMPRESS).stderr.splitlines()) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_full_or_forbidden_disk_is_one_line(monkeypatch, number):
    fake_recipe(monkeypatch, "compress", OSError(number, "the reason", "out/model.safetensors"))
    result = billhook(*COMPRESS)
    assert result.exit_code == 2
    assert result.stderr.startswith("billhook: error: out/model.safetensors: the reason")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(errno.EBADF, "a bug")])
def test_what_nobody_foresaw_keeps_its_traceback(monkeypatch, error):
    fake_recipe(monkeypatch, "compress", error)
    result = billhook(*COMPRESS)
    assert result.exit_code == 1
    assert result.exception is error


def test_interrupted(monkeypatch):
    fake_recipe(monkeypatch, "compress", KeyboardInterrupt())
    result = billhook(*COMPRESS)
    assert result.exit_code == 130
    assert result.stderr == "billhook: interrupted; run the same command again to resume\n"


def test_interrupted_where_there_is_nothing_to_resume(monkeypatch):
    fake_recipe(monkeypatch, "bench", KeyboardInterrupt())
    assert billhook("bench", "out", "--against", "demo").stderr == "billhook: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["compress", "demo", "--out", "out"], "--budget"),
        (["compress", "demo", "--budget", "params=0.8"], "--out"),
        (["compress", "--budget", "params=0.8", "--out", "out"], "MODEL"),
        ([*COMPRESS, "--target", "vllm"], "uniform"),
        ([*COMPRESS, "--dtype", "int8"], "bfloat16"),
        ([*COMPRESS, "--max-new-tokens", "0"], "--max-new-tokens"),
        (["bench", "out"], "--against"),
        (["compres", "demo"], "compress"),
        ([*COMPRESS, "--budgets", "params=0.7"], "--budget"),
        ([*COMPRESS, "too", "much"], "too much"),
        ([*COMPRESS, "--seed", "-1"], "--seed"),
        (["--nonsense"], "--nonsense"),
        (["recipes", "hide"], "hide"),
        (["recipes", "show"], "NAME"),
    ],
)
def test_wrong_usage_names_what_is_wrong_in_one_line(monkeypatch, arguments, named):
    calls = fake_recipe(monkeypatch, "compress", example_run())
    result = billhook(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("billhook: error: ") and result.stderr.endswith("--help)\n")
    assert len(result.stderr.splitlines()) == 1
    assert named in result.stderr
    assert result.stdout == "" and not calls


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--method", "foo", "'foo' is not one of 'closed-form', "),
        ("--dtype", "foo", "'foo' is not one of 'auto', "),
        ("--tokens", "0", "it must be at least 1 "),
        ("--seed", "x", "it must be a whole number "),
    ],
)
def test_a_wrong_value_is_told_in_our_words(option, value, told):
    stderr = billhook("heal", "out", "--out", "better", option, value).stderr
    assert stderr.startswith(f"billhook: error: Invalid value for '{option}': {told}")


@pytest.mark.parametrize("arguments", [[], ["compress"], ["bench"]])
def test_nothing_given_is_answered_with_the_help(arguments):
    result = billhook(*arguments)
    assert result.exit_code == 2
    assert "Usage: billhook" in result.output and "--help" in result.output
    assert "error" not in result.output
