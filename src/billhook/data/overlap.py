"""Has the model been judged on what it was calibrated on?"""

from __future__ import annotations

import torch

from billhook.data.windows import Windows
from billhook.plan.errors import InputError

_RUN = 24  # tokens in a row that two texts share only by copying
_TOLERATED = 0.05  # boilerplate and repeated documents


def overlap(evaluated: Windows, calibrated: Windows) -> float:
    """The share of runs of 24 tokens in ``evaluated`` that also stand somewhere in ``calibrated``, wherever the
    windows were cut. Runs are compared by a 64-bit hash."""
    run = min(_RUN, evaluated.ids.shape[1], calibrated.ids.shape[1])
    return float(torch.isin(_hashes(evaluated.ids, run), _hashes(calibrated.ids, run)).double().mean())


def check_overlap(evaluated: Windows, calibrated: Windows) -> None:
    """InputError if more than 5% of the text to evaluate on is also in the calibration."""
    share = overlap(evaluated, calibrated)
    if share > _TOLERATED:
        raise InputError(
            f"text {evaluated.name} cannot be evaluated on: {share:.0%} of it stands in the calibration text "
            f"{calibrated.name}; give another text"
        )


def _hashes(ids: torch.Tensor, run: int) -> torch.Tensor:
    powers = torch.ones(run, dtype=torch.int64)
    for i in range(1, run):
        powers[i] = powers[i - 1] * 6364136223846793005  # wraps around, as a hash may
    return (ids.unfold(1, run, 1) * powers).sum(-1).flatten()
