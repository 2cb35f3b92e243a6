"""A search that is killed loses nothing, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from synthetic import Synthetic, problem

from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.search import Found, Ledger, Memo, greedy

HEADER = {"model": "m", "calibration": "c", "objective": "kl", "seed": 0}
BLOCKS = 10


def search(objective: Synthetic, ledger: Ledger | None = None) -> Found:
    return greedy(problem(BLOCKS, "params=0.7"), Memo(objective, ledger), refine=1.0)


def objective(**fields: float) -> Synthetic:
    return Synthetic(BLOCKS, 16, pairs=0.5, noise=0.05, **fields)


class Killed(Exception):
    pass


class Mortal(Synthetic):
    """Dies instead of giving one more figure than ``life``."""

    life = 0

    def at(self, drops: frozenset[Address]) -> float:
        if len(self.asked) == self.life:
            raise Killed
        return super().at(drops)


def test_interrupted_anywhere_the_resumed_search_is_the_same_and_asks_for_little_twice(tmp_path: Path) -> None:
    whole = objective()
    expected = search(whole)
    assert any(step.restored for step in expected.steps), "exchanges happen, so states go back and forth"
    for life in range(len(whole.asked)):
        path = tmp_path / f"{life}.jsonl"
        dying = Mortal(BLOCKS, 16, pairs=0.5, noise=0.05)
        dying.life = life
        with pytest.raises(Killed):
            search(dying, Ledger(path, HEADER))
        resumed = objective()
        assert search(resumed, Ledger(path, HEADER)) == expected, f"killed at evaluation {life}"
        assert len(resumed.asked) <= len(whole.asked) - life + 1


def test_a_finished_search_is_read_without_touching_the_model(tmp_path: Path) -> None:
    expected = search(objective(), Ledger(tmp_path / "l.jsonl", HEADER))
    again = objective()
    assert search(again, Ledger(tmp_path / "l.jsonl", HEADER)) == expected
    assert again.asked == []
    assert again.moves == 0


CHILD = """
import sys
sys.path[:0] = sys.argv[2:]
from test_ledger import HEADER, Ledger, objective, search
search(objective(pause=0.02), Ledger(sys.argv[1], HEADER))
"""


def test_kill_9_in_the_middle_of_a_search(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    here = Path(__file__).parent
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path), str(here), str(here.parent)])
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < 12:
        assert child.poll() is None and time.monotonic() < deadline, "the search should have been under way"
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    finished = path.read_bytes().count(b"\n") - 1

    uninterrupted = objective()
    expected = search(uninterrupted)
    assert 0 < finished < expected.evaluations, "it was killed in the middle"
    resumed = objective()
    found = search(resumed, Ledger(path, HEADER))
    assert repr(found) == repr(expected), "work counter and exact figures included"
    assert len(resumed.asked) <= expected.evaluations - finished + 1


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    expected = search(objective(), Ledger(path, HEADER))
    whole = path.read_bytes()
    for cut in (1, 3, 20, len(whole) - 10):
        path.write_bytes(whole[:-cut])
        assert search(objective(), Ledger(path, HEADER)) == expected
        assert path.read_bytes() == whole, "and the file is whole again"


def test_values_are_kept_exactly(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-300, float("inf"), 7.0, 1 / 3]
    ledger = Ledger(tmp_path / "l.jsonl", HEADER)
    for number, value in enumerate(values):
        ledger.record((f"decoder.{number}",), value, number)
    ledger.close()
    again = Ledger(tmp_path / "l.jsonl", HEADER)
    assert [again.entries[f"decoder.{n}",] for n in range(5)] == [(v, n) for n, v in enumerate(values)]


def test_the_ledger_of_another_search_is_refused(tmp_path: Path) -> None:
    Ledger(tmp_path / "l.jsonl", HEADER).close()
    with pytest.raises(InputError) as caught:
        Ledger(tmp_path / "l.jsonl", {**HEADER, "calibration": "d"})
    assert "belongs to another search (calibration is 'c' there and 'd' here); remove it to search anew" in str(
        caught.value
    )
    with pytest.raises(InputError, match="window is None there and 64 here"):
        Ledger(tmp_path / "l.jsonl", {**HEADER, "window": 64})


def test_a_damaged_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    figures = ("NaN", '"1.0"', "true", "null", "[1.0]")
    rows = [f'{{"drops": ["decoder.1"], "value": {figure}, "work": 1}}' for figure in figures]
    for row in (
        *rows,
        "{",
        "[]",
        '{"drops": ["decoder.1"], "value": 1.0}',
        '{"drops": 3, "value": 1.0, "work": 1}',
        "null",
    ):
        path.write_text(json.dumps({"ledger": 1, **HEADER}) + f"\n{row}\n")
        with pytest.raises(InputError, match=r"is damaged in line 2; remove it to search anew"):
            Ledger(path, HEADER)
    path.write_bytes(b"\xff\n")
    with pytest.raises(InputError, match="is damaged in line 1"):
        Ledger(path, HEADER)
    with pytest.raises(InputError, match="cannot be used"):
        Ledger(tmp_path, HEADER)
    with pytest.raises(InputError, match="cannot be used"):
        Ledger(tmp_path / "absent" / "l.jsonl", HEADER)


def test_nothing_is_evaluated_twice_and_the_model_moves_only_for_a_new_figure() -> None:
    counted = objective()
    memo = Memo(counted)
    one, two = frozenset({Address("decoder", 1)}), frozenset({Address("decoder", 2)})
    assert memo.at(one, frozenset()) == memo.at(one) == counted.figure(one)
    assert memo.at(one | two, one) == memo.at(one | two, two)
    assert memo.evaluations == len(counted.asked) == 2
    assert memo.work == counted.work
    assert counted.moves == 2


def test_nan_is_refused() -> None:
    class Nan(Synthetic):
        def figure(self, drops: object) -> float:
            return float("nan")

    with pytest.raises(InputError, match="the objective is NaN"):
        Memo(Nan(3)).at(frozenset({Address("decoder", 1)}))
