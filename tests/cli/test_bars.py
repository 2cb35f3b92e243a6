"""Progress: bars in a terminal, a line now and then elsewhere, standard output untouched."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from billhook.cli import progress


@pytest.fixture
def terminal(monkeypatch):
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=80, color_system=None, legacy_windows=False)
    monkeypatch.setattr(progress, "Console", lambda stderr: console)
    return written


def test_one_bar_a_label_with_the_time_left(terminal, capsys):
    with progress.bars() as advance:
        advance("search", 1, 4)
        advance("search", 4, 4)
        advance("bench: decode", 1, 2)
        advance("bench: decode", 2, 2)
    last = re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", terminal.getvalue()).split("\r")[-1].rstrip().splitlines()
    assert [line.split("━")[0].strip() for line in last] == ["search", "bench: decode"]
    assert all("100%" in line for line in last)
    assert capsys.readouterr().out == ""


def test_bars_vanish_when_something_goes_wrong(terminal):
    with pytest.raises(ValueError, match="stop"), progress.bars() as advance:
        advance("search", 1, 4)
        raise ValueError("stop")
    assert terminal.getvalue().endswith("\x1b[1A\x1b[2K")  # up one line and wipe it


def test_nothing_is_drawn_before_something_happens(terminal):
    with progress.bars():
        pass
    assert terminal.getvalue() == ""


def test_a_line_every_ten_seconds_where_there_is_no_terminal(monkeypatch, capsys):
    now = iter([0.0, 5.0, 12.0, 13.0, 23.0, 34.0, 45.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with progress.bars() as advance:
        for done in range(4):
            advance("search", done, 4)
        for done in (2, 3):  # went on from there: what came before took no time now
            advance("training", done, 10)
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [
        "billhook: search: 1 of 4, 0:21 left",
        "billhook: search: 3 of 4, 0:06 left",
        "billhook: training: 2 of 10",
        "billhook: training: 3 of 10, 1:17 left",
    ]
    assert shown.out == ""


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (62, "1:02"), (3725, "1:02:05")])
def test_clock(seconds, shown):
    assert progress._clock(seconds) == shown
