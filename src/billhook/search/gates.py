"""A gate for each unit, trained until it is open or shut."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from billhook.plan.address import Address
from billhook.search.objective import Progress
from billhook.search.one_shot import one_shot
from billhook.search.path import Found
from billhook.search.problem import Problem
from billhook.search.relaxed import Relaxed, shares

RATE = 0.15  # how far a gate moves in one step at most
RAMP = 0.4  # share of the steps in which the budget comes down
PULL = 12.0  # discount of a shut unit in the end, in median prices
_MEMORY = 0.5  # of the prices seen before


def gates(
    problem: Problem, relaxed: Relaxed, *, steps: int, progress: Progress | None = None
) -> tuple[Found, dict[Address, float]]:
    """Train one gate g in [0, 1] for each unit, all at once, and drop the units whose gates are shut furthest.

    Minimises the loss by projected gradient descent, the weights fixed, under sum_u share_u (1 - g_u) >= the budget,
    which comes down from dense over the first part of the steps. A unit's price is the fall of the loss for letting it
    through further, -d loss / d g, for its share of the budget: gates move by price, up to ``RATE`` a step, and are
    projected back onto the budget. The optimum of that is gates half open everywhere; so in the second part every
    price is lowered in proportion to how far the unit is shut, up to ``PULL`` median prices (a concave penalty
    switched on slowly, as in homotopy methods), which drives gates apart. Since all units are shut together, a unit is
    priced in the presence of what has gone already.

    Source: FoldGPT (arXiv 2407.00928) ranks blocks by trained gates, so that the coupling between them counts; how its
    gates are regularised is not in its abstract. Returns what is found, and the gates.

    Cost: a forward and a backward pass over one window a step, whatever the number of units.
    """
    share = shares(problem)
    opened: dict[Address, float] = dict.fromkeys(share, 1.0)
    prices: dict[Address, float] = {}
    ramp = max(1, round(RAMP * steps))
    for step in range(steps):
        if progress is not None:
            progress("gates", step, steps)
        _, slopes = relaxed.slopes(opened, step)
        for unit in share:
            price = -slopes[unit] / share[unit]
            prices[unit] = _MEMORY * prices.get(unit, price) + (1 - _MEMORY) * price
        usual = median(abs(price) for price in prices.values()) or 1.0
        pull = PULL * max(0, step + 1 - ramp) / (steps - ramp + 1)
        net = {unit: prices[unit] / usual - pull * (1 - opened[unit]) for unit in share}
        undecided = [net[u] for u in share if 0 < opened[u] < 1] or list(net.values())
        middle = median(undecided)
        moved = {u: opened[u] + RATE * min(1.0, max(-1.0, net[u] - middle)) for u in share}
        opened = projected(moved, share, min(1.0, (step + 1) / ramp))
    if progress is not None:
        progress("gates", steps, steps)
    return one_shot(problem, opened, work=relaxed.work), opened


def projected(gates: Mapping[Address, float], share: Mapping[Address, float], far: float) -> dict[Address, float]:
    """All gates moved by the same amount and cut off at 0 and 1, so that sum_u share_u (1 - g_u) is ``far``: the
    nearest point on the budget, where distances are weighed by share. By bisection."""

    def shifted(by: float) -> dict[Address, float]:
        return {unit: min(1.0, max(0.0, gate - by)) for unit, gate in gates.items()}

    low, high = min(gates.values()) - 1.0, max(gates.values())
    for _ in range(60):
        middle = (low + high) / 2
        if sum(share[unit] * (1 - gate) for unit, gate in shifted(middle).items()) < far:
            low = middle
        else:
            high = middle
    return shifted(high)
