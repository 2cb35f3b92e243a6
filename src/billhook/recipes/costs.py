"""What a plan makes of the costs of a model."""

from __future__ import annotations

from collections.abc import Mapping

from billhook.measure.cost import path_costs, quantities
from billhook.plan.address import Address
from billhook.plan.check import normalise
from billhook.plan.outline import Outline
from billhook.plan.plan import Plan
from billhook.plan.record import Quantity
from billhook.plan.visits import orders, unvisited


def costs_of(
    plan: Plan, outline: Outline, zeros: Mapping[Address, int] | None = None, beside: int = 0
) -> dict[str, Quantity]:
    """Every kind of cost before and after. A block that runs again for another one costs no parameters, and all else
    that a block costs. ``zeros``: how many weights of each sublayer are zero, if not as many as the plan says;
    ``beside``: parameters of paths that every token takes besides."""
    if beside:
        added = path_costs(outline, beside)
        costs = costs_of(plan, outline, zeros).items()
        return {k: q.model_copy(update={"compressed": q.compressed + added.get(k, 0.0)}) for k, q in costs}
    if zeros is None:
        zeros = {edit.unit: sum(edit.zeros.values()) for edit in plan.sparsities}
    if plan.schedule is None:
        drops = normalise(plan.drops, outline)
        return quantities(outline, drops, plan.keeps, zeros, plan.factors, channels=plan.channels)
    found = orders(plan, outline)
    drops = normalise(plan.drops | plan.schedule.skips() | unvisited(found, outline), outline)
    again = [
        Address(name, block) for name, order in found.items() for i, block in enumerate(order) if block in order[:i]
    ]
    return quantities(outline, drops, plan.keeps, zeros, plan.factors, again, plan.channels)


def of_dense(costs: Mapping[str, Quantity]) -> dict[str, float]:
    """Every cost as a fraction of dense; kinds that the dense model has none of are left out."""
    return {kind: cost.compressed / cost.dense for kind, cost in costs.items() if cost.dense}
