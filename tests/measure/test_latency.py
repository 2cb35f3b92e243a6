import re
from pathlib import Path

import pytest
import torch

import billhook
from billhook.measure import latency
from billhook.runtime import clock as reading


class Clock:
    """Stands still unless something takes time."""

    def __init__(self, monkeypatch):
        self.time = 0.0
        self.log = []
        monkeypatch.setattr(latency, "now", lambda: self.time)

    def run(self, name, prepare=100.0, work=1.0):
        def prepared():
            self.time += prepare
            return timed

        def timed():
            self.time += work
            self.log.append(name)

        return prepared


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_only_the_run_is_timed_not_its_preparation(clock):
    times = latency.interleaved({"a": clock.run("a", work=2.0), "b": clock.run("b", work=3.0)}, rounds=4)
    assert times == {"a": [2.0] * 4, "b": [3.0] * 4}


def test_warm_up_runs_everything_and_rounds_alternate(clock):
    latency.interleaved({"a": clock.run("a"), "b": clock.run("b")}, rounds=3)
    assert "".join(clock.log) == "ab" + "ab" + "ba" + "ab"


def test_ticks_after_warm_up_and_every_round(clock):
    seen = []
    latency.interleaved({"a": clock.run("a")}, rounds=3, tick=lambda: seen.append(len(clock.log)))
    assert seen == [1, 2, 3, 4]


def test_the_clock_is_read_after_all_devices_are_done(monkeypatch):
    log = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: log.append(f"device {device}"))
    monkeypatch.setattr(reading.time, "perf_counter", lambda: float(log.append("clock") or 0))
    latency.seconds(lambda: log.append("run"))
    one = ["device 0", "device 1", "clock"]
    assert log == [*one, "run", *one]


def test_nothing_else_reads_a_clock():
    """But the progress bars of the command line, whose times are for looking at."""
    source = Path(billhook.__file__).parent
    clocks = re.compile(r"perf_counter|monotonic\(|time\.time\(|process_time|cuda\.Event|timeit")
    readers = {p.relative_to(source).as_posix() for p in source.rglob("*.py") if clocks.search(p.read_text("utf-8"))}
    assert {path for path in readers if not path.startswith("cli/")} == {"runtime/clock.py"}
