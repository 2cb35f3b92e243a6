"""A budget of time: smaller and smaller cuts' speed is measured until one is fast enough."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, TypeVar

from billhook.evaluate.workload import fitting, prompt_ids, ready
from billhook.measure.latency import interleaved
from billhook.measure.patch import observing
from billhook.plan.errors import InputError

Progress = Callable[[str, int, int], None]
Found = TypeVar("Found")

LOOKS = 8
ROUNDS = 7
CLOSE = 0.02  # of the dense time: what clocks can tell apart
WORKLOAD = "decode, batch 1"


def fast_enough(
    asked: float, seek: Callable[[float], Found], time_of: Callable[[Found], float], progress: Progress | None = None
) -> tuple[Found, float]:
    """The mildest cut found whose time is at most ``asked`` of the dense model's, and that time.

    ``seek`` cuts to a share of the block parameters, ``time_of`` measures a cut, 1 being dense. Shares are taken where
    a straight line between the nearest cut that is too slow and the nearest that is fast enough meets what is asked
    (regula falsi, kept off the ends), until one is fast enough by no more than ``CLOSE``, at most ``LOOKS`` times. What
    lies outside the blocks takes time too, so less than ``asked`` of their parameters stay.
    Raises InputError where no cut was fast enough.
    """
    slow, fast = (1.0, 1.0), (0.0, 0.0)  # share, time: the second is a guess until a cut was fast enough
    best: tuple[Found, float] | None = None
    refused = ""
    for look in range(LOOKS):
        reach = (slow[1] - asked) / max(slow[1] - fast[1], 1e-9)
        least = 0.1 if best is not None or look == 0 else 0.5  # towards a guess in large steps
        share = slow[0] + min(max(reach, least), 0.9) * (fast[0] - slow[0])
        if progress is not None:
            progress(f"a cut that takes {asked:.0%} of the time", look, LOOKS)
        try:
            found = seek(share)
        except InputError as error:
            refused = str(error)
            fast = (share, fast[1]) if best is None else fast  # no recipe goes as far: what is asked must lie above
            continue
        time = time_of(found)
        if time > asked:
            slow = (share, time)
            continue
        best, fast = (found, time), (share, time)
        if time >= asked - CLOSE:
            break
    if progress is not None:
        progress(f"a cut that takes {asked:.0%} of the time", LOOKS, LOOKS)
    if best is None:
        reason = f"; {refused}" if refused else ""
        raise InputError(
            f"budget latency={asked:g} cannot be met: with {slow[0]:.2f} of the block parameters, decoding still takes "
            f"{slow[1]:.2f} of the time{reason}"
        )
    return best


def decode_time(dense: Any, cut: Any) -> float:
    """Time of decoding at batch 1 as a share of the dense model's: the median ratio over ``ROUNDS`` interleaved rounds.

    Cost: ROUNDS + 1 runs of the workload by both models."""
    (workload,) = (w for w in fitting(dense) if w.name == WORKLOAD)
    ids = prompt_ids(workload, dense)
    with observing(dense), observing(cut):
        times = interleaved({"dense": ready(dense, workload, ids), "cut": ready(cut, workload, ids)}, ROUNDS)
    return statistics.median(c / d for d, c in zip(times["dense"], times["cut"], strict=True))
