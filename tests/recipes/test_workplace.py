"""One run at a time works on a result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from billhook.plan.errors import InputError
from billhook.recipes.compress import compress
from billhook.recipes.workplace import claimed, workplace

HOLD = """
import sys, time
from billhook.recipes.workplace import claimed
with claimed(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_at_once_until_the_first_is_gone_even_killed(tiny_lm: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE) as first:
        assert first.stdout is not None and first.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=r"another run is working on .*out; wait for it to end, or name another"):
            compress(tiny_lm, budget="params=0.7", out=out, recipe="last", max_new_tokens=4)
        with claimed(tmp_path / "other"):
            pass
        os.kill(first.pid, signal.SIGKILL)
    with claimed(out) as place:
        assert place == workplace(out)


def test_a_workplace_that_cannot_be_made(tmp_path: Path) -> None:
    workplace(tmp_path / "out").touch()
    with pytest.raises(InputError, match="out cannot be made"), claimed(tmp_path / "out"):
        raise AssertionError


def test_nothing_is_left_where_nothing_was_paid_for(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with pytest.raises(ZeroDivisionError), claimed(out) as place:
        assert place.is_dir()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with claimed(out) as place:
        (place / "paid.jsonl").touch()
    assert [path.name for path in place.iterdir()] == ["paid.jsonl"]
