"""What may be dropped, and how much has to go."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace

from billhook.measure.cost import NEW_TOKENS, PROMPT_TOKENS, CostModel, Costs
from billhook.plan.address import Address
from billhook.plan.budget import Budget, within
from billhook.plan.check import check_target, units, unsound
from billhook.plan.errors import InputError
from billhook.plan.outline import Outline
from billhook.plan.target import Target


@dataclass(frozen=True)
class Problem:
    """``candidates`` are the units that a plan may drop, in order of address; ``ceilings`` the budget in absolute
    terms. Made by ``pose``, which makes sure that there is a solution."""

    outline: Outline
    budget: Budget
    costs: CostModel
    ceilings: Costs
    candidates: tuple[Address, ...]

    def met(self, costs: Costs) -> bool:
        """Whether these costs keep every limit of the budget."""
        return all(within(costs[kind], ceiling) for kind, ceiling in self.ceilings.items())

    def gain(self, unit: Address, drops: Set[Address], costs: Costs) -> float:
        """How far dropping ``unit`` brings a state towards the budget; 1 for each limit is all the way from dense.

        Only what is still missing counts: units that would finish the budget are worth the same, whatever their size,
        so that among them the least harmful one is taken and not the one that overshoots most.
        """
        saving = self.costs.saving(unit, drops)
        after = {kind: costs[kind] - saving[kind] for kind in self.ceilings}
        return self.missing(costs) - self.missing(after)

    def missing(self, costs: Costs) -> float:
        """How far a state is from the budget, summed over its limits: 1 for each in the dense model, 0 when met."""
        open_ = [(kind, ceiling) for kind, ceiling in self.ceilings.items() if not within(costs[kind], ceiling)]
        return sum((costs[kind] - ceiling) / (self.costs.dense[kind] - ceiling) for kind, ceiling in open_)


def pose(
    outline: Outline,
    budget: Budget,
    unit: str = "sublayer",
    target: Target = Target.ANY,
    *,
    stack: str | None = None,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
) -> Problem:
    """The task of meeting ``budget`` by dropping units of one kind ("block", "sublayer", "attention", "mlp", ...), of
    one stack where it is named, for ``target``; FLOPs and cache are counted for the given workload. For the budget
    ``until=cliff`` the ceiling is what is left when everything has gone that may: as far as a search can look.

    Raises InputError where it has no solution, before anything is searched.
    """
    check_target(target, outline)
    candidates = tuple(a for a in units(outline, unit, target) if stack in (None, a.stack))
    where = f"this {outline.family} model" if stack is None else f"stack {stack} of this {outline.family} model"
    if not candidates:
        held = [why for place, why in outline.pinned.items() if (Address.parse(place).sublayer or "block") == unit]
        more = f": {held[0]}" if held else "; try unit block or another target"
        raise InputError(f"no {unit} of {where} can be dropped for target {target}{more}")
    costs = CostModel(outline, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    problem = Problem(outline, budget, costs, budget.ceilings(costs.dense), candidates)
    least = costs.of(_all_that_can_go(problem))
    if budget.until_cliff:
        if least["params"] >= costs.dense["params"]:
            raise InputError(f"budget {budget}: no {unit} of {where} may go without the others")
        return replace(problem, ceilings={"params": least["params"]})
    for kind, ceiling in problem.ceilings.items():
        if not any(costs.saving(candidate)[kind] > 0 for candidate in candidates):
            raise InputError(f"budget {budget}: dropping one {unit} of {where} saves no {kind}; use another unit")
        if not within(least[kind], ceiling):
            raise InputError(
                f"budget {budget} cannot be met: with every {unit} of {where} gone that may go, "
                f"{kind} is still {least[kind] / costs.dense[kind]:.3f} of dense"
            )
    return problem


def _all_that_can_go(problem: Problem) -> set[Address]:
    drops: set[Address] = set()
    for unit in sorted(problem.candidates, key=lambda u: (-problem.costs.saving(u)["params"], u)):
        if unsound(drops | {unit}, problem.outline) is None:
            drops.add(unit)
    return drops
