"""Which units a model can spare, learned from what random choices earn."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from statistics import fmean

from billhook.plan.address import Address
from billhook.search.objective import Drops, Progress
from billhook.search.one_shot import one_shot
from billhook.search.path import Found
from billhook.search.problem import Problem
from billhook.search.relaxed import Relaxed, cheapest, shares


def bandit(
    problem: Problem,
    relaxed: Relaxed,
    *,
    rounds: int,
    draws: int,
    rate: float,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Found, dict[Address, float]]:
    """Bandit learning of how much each unit is worth, and removal of those worth least.

    In every round ``draws`` ways to meet the budget are drawn, unit by unit with probability proportional to
    exp(-worth) among those left, and tried on the same text. A draw earns e^-loss. Each unit that it skips loses
    ``rate`` x (earned / mean earned - 1): what is above the mean of the round makes the skipped units cheaper, what is
    below dearer. The model is trained with one of the draws in each round, where a stand-in (adapters in place of what
    is skipped) is to learn.

    Source: dynamic architecture skipping (arXiv 2309.01479), which takes modules for the arms of a bandit and adds
    adapters where they are skipped. In its code draws of a round differ, a module is drawn by the sigmoid of its worth,
    whose slope scales the step, and the step is that of the reward itself, not of its share of the mean.
    Cost: ``draws`` + 2 forward passes over one window a round, those of the draws without what they skip. Returns what
    is found, and the worths.
    """
    draw = random.Random(seed)
    worth = dict.fromkeys(shares(problem), 0.0)
    for number in range(rounds):
        if progress is not None:
            progress("bandit", number, rounds)
        tried = [_drawn(problem, worth, draw) for _ in range(draws)]
        earned = [math.exp(-relaxed.loss(dict.fromkeys(drops, 0.0), number)) for drops in tried]
        usual = fmean(earned) or 1.0
        for drops, reward in zip(tried, earned, strict=True):
            for unit in drops:
                worth[unit] -= rate * (reward / usual - 1)
        relaxed.slopes(dict.fromkeys(draw.choice(tried), 0.0), number)
    if progress is not None:
        progress("bandit", rounds, rounds)
    return one_shot(problem, worth, work=relaxed.work), worth


def _drawn(problem: Problem, worth: Mapping[Address, float], draw: random.Random) -> Drops:
    """A way to meet the budget: units in the order of worth + Gumbel noise are drawn by exp(-worth) one by one."""
    return cheapest(problem, {unit: value - gumbel(draw) for unit, value in worth.items()}).drops


def gumbel(draw: random.Random) -> float:
    """A standard Gumbel variate."""
    return -math.log(-math.log(draw.uniform(1e-12, 1 - 1e-12)))
