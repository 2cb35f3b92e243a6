"""The one place that reads a clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

Timed = Callable[[], object]


def now() -> float:
    """Seconds on a monotonic clock, once every accelerator has finished what it was given.

    A host clock between two full synchronisations rather than a pair of events: events see one stream of one device,
    while a model may lie on several and launching its kernels costs host time that a user waits for as well.
    """
    if torch.accelerator.is_available():
        for index in range(torch.accelerator.device_count()):
            torch.accelerator.synchronize(index)
    return time.perf_counter()


def seconds(run: Timed) -> float:
    """How long one call takes, in seconds."""
    start = now()
    run()
    return now() - start


def interleaved(
    runs: Mapping[str, Callable[[], Timed]], rounds: int, *, tick: Callable[[], None] | None = None
) -> dict[str, list[float]]:
    """Time several things against each other: seconds of every run in every round.

    Each run is a preparation, which is not timed, that returns what is. All are warmed up once in full; then every
    round times each of them, in alternating order, so that a machine that grows slower or faster treats them alike.
    ``tick`` is called after the warm-up and after each round.
    """
    for prepare in runs.values():
        prepare()()
    times: dict[str, list[float]] = {name: [] for name in runs}
    _call(tick)
    for index in range(rounds):
        for name in list(runs) if index % 2 == 0 else reversed(list(runs)):
            times[name].append(seconds(runs[name]()))
        _call(tick)
    return times


def _call(tick: Callable[[], None] | None) -> None:
    if tick is not None:
        tick()
