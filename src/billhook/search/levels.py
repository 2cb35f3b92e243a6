"""What each sublayer is narrowed by at what price: looked at on a few levels, and between them interpolated."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from billhook.plan.address import Address
from billhook.plan.plan import Keep
from billhook.search.width import Space, WidthProblem, keep_of, order_of

Progress = Callable[[str, int, int], None]
LEVELS = (0.85, 0.65, 0.4)  # shares of the units left; and as few as may be left


def prices(
    problem: WidthProblem,
    scores: Mapping[Address, Tensor],
    damage: Callable[[Keep], float],
    progress: Progress | None = None,
) -> dict[Address, Tensor]:
    """What each further unit of a sublayer costs, in the order in which ``scores`` let them go: float64 [units].

    ``damage`` says how far from dense the model is if one sublayer alone is narrowed. It is asked for a few levels of
    each; what comes out rises with the units gone, through a monotone cubic (Fritsch and Carlson 1980), and the price
    of a unit is the step there. So a sublayer whose damage rises late gives much, wherever it stands.

    Relation: SPDY (Frantar and Alistarh 2022, arXiv 2201.13096) and ZipLM (Kurtic et al. 2023, arXiv 2302.04089) also
    choose levels a layer under a budget, by errors measured layer by layer; here the damage is the output's, and the
    levels are interpolated instead of chosen from. Cost: four times ``damage`` a sublayer (a KV group at a time where
    there are fewer).
    """
    spaces = [space for space in problem.spaces if space.address in scores]
    found = {}
    for number, space in enumerate(spaces):
        order = order_of(scores[space.address], space.parts)
        lefts = levels_of(space)
        rises = [damage(keep_of(space, order, left)) for left in lefts]
        found[space.address] = _steps(space.count, lefts, rises)
        if progress is not None:
            progress("every sublayer narrowed", number + 1, len(spaces))
    return found


def levels_of(space: Space) -> list[int]:
    """How many units are left when a sublayer is looked at, from most to fewest."""
    allowed = space.left[1:]
    nearest = {min(allowed, key=lambda left: abs(left - share * space.count)) for share in LEVELS} if allowed else set()
    return sorted({*nearest, *allowed[-1:]}, reverse=True)


def _steps(count: int, lefts: list[int], rises: list[float]) -> Tensor:
    """The step of the damage at each unit that goes; what is never looked at costs as the last that was."""
    gone = np.array([0, *(count - left for left in lefts)], dtype=np.float64)
    damage = np.maximum.accumulate([0.0, *rises])
    if len(gone) == 1:
        return torch.zeros(count, dtype=torch.float64)
    curve = PchipInterpolator(gone, damage)
    steps = np.diff(curve(np.minimum(np.arange(count + 1), gone[-1])))
    steps[int(gone[-1]) :] = steps[int(gone[-1]) - 1]
    return torch.from_numpy(steps)
