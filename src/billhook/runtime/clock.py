"""The one place that reads a clock."""

from __future__ import annotations

import time

import torch


def now() -> float:
    """Seconds on a monotonic clock, once every accelerator has finished what it was given.

    A host clock between two full synchronisations rather than a pair of events: events see one stream of one device,
    while a model may lie on several and launching its kernels costs host time that a user waits for as well.
    """
    if torch.accelerator.is_available():
        for index in range(torch.accelerator.device_count()):
            torch.accelerator.synchronize(index)
    return time.perf_counter()
