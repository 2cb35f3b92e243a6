"""The command line in this process, and recipes that only note what they were asked."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from billhook.cli import app

_RUNNER = CliRunner(env={"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"})


def billhook(*arguments: object) -> Result:
    """Run ``billhook`` with these arguments, at 80 columns."""
    return _RUNNER.invoke(app, [str(a) for a in arguments], prog_name="billhook")


def fake_recipe(monkeypatch: pytest.MonkeyPatch, name: str, answer: object) -> list[SimpleNamespace]:
    """Put a fake in the place of ``billhook.recipes.NAME``, which returns ``answer``, or raises it where it is an
    exception. Returns the list of its calls, which grows."""
    calls: list[SimpleNamespace] = []

    def fake(*positional: Any, **named: Any) -> object:
        calls.append(SimpleNamespace(positional=positional, **named))
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setitem(sys.modules, f"billhook.recipes.{name}", SimpleNamespace(**{name: fake}))
    return calls
