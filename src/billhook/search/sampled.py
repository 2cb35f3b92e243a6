"""Masks drawn at random, from a distribution that learns which are good."""

from __future__ import annotations

import random
from statistics import fmean

from billhook.plan.address import Address
from billhook.search.bandit import gumbel
from billhook.search.objective import Progress
from billhook.search.one_shot import one_shot
from billhook.search.path import Found
from billhook.search.problem import Problem
from billhook.search.relaxed import Relaxed, cheapest, shares

HEAT = (1.0, 0.1)  # of the noise, from the first step to the last
RAMP = 0.5  # share of the steps in which the budget comes down


def sampled(
    problem: Problem,
    relaxed: Relaxed,
    *,
    steps: int,
    rate: float,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Found, dict[Address, float]]:
    """Learn a logit for each unit by sampling whole masks, and drop the units of lowest logits.

    In every step the units of lowest logit + Gumbel noise are skipped, as many as the budget asks for by then, and
    the slopes d loss / d gate are taken at that mask (straight-through: as if gates were continuous). A unit's price
    is the fall of the loss for letting it through, for its share of the budget. The logit of a skipped unit rises by
    ``rate`` x what its price is above the mean of those skipped, in mean sizes of prices and at most 1; it falls by
    what it is below. Units that stay learn nothing in that step: at an open gate a trained model has next to no
    slope. The noise cools down, the budget comes down from dense over the first half (random masks of a language
    model at the whole budget are so bad that their slopes say nothing). Weights that a stand-in adds are trained
    along, so that what counts is the loss a model could come back to.

    Source: TinyFusion (arXiv 2412.01199). The paper draws N of M layers in each group of neighbours by a softmax over
    all patterns; here all units compete within one budget, whatever their size.
    Cost: a forward and a backward pass over one window a step. Returns what is found, and the logits.
    """
    draw = random.Random(seed)
    share = shares(problem)
    logits = dict.fromkeys(share, 0.0)
    for step in range(steps):
        if progress is not None:
            progress("sampled masks", step, steps)
        heat = HEAT[0] + (HEAT[1] - HEAT[0]) * step / max(1, steps - 1)
        noisy = {unit: logit - heat * gumbel(draw) for unit, logit in logits.items()}
        mask = cheapest(problem, noisy, min(1.0, (step + 1) / max(1, RAMP * steps)))
        _, slopes = relaxed.slopes(dict.fromkeys(mask.drops, 0.0), step)
        prices = {unit: -slopes[unit] / share[unit] for unit in mask.drops}
        middle = fmean(prices.values())
        usual = fmean(map(abs, prices.values())) or 1.0
        for unit, price in prices.items():
            logits[unit] += rate * min(1.0, max(-1.0, (price - middle) / usual))
    if progress is not None:
        progress("sampled masks", steps, steps)
    return one_shot(problem, logits, work=relaxed.work), logits
