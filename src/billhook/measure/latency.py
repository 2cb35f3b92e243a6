"""Things timed against each other, in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from billhook.runtime.clock import now

Timed = Callable[[], object]


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
