"""How wide which linear stays in between: from the energy of each direction to ranks under a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from billhook.measure.cost import CostModel, Costs
from billhook.plan.address import Address
from billhook.plan.budget import Budget, within
from billhook.plan.check import check_target
from billhook.plan.errors import InputError
from billhook.plan.outline import LinearOutline, Outline
from billhook.plan.plan import Factorise
from billhook.plan.target import Target

Spread = Literal["uniform", "global"]
Linear = tuple[Address, str]  # (sublayer, path within the block)
_HALVINGS = 60  # of an interval, until nothing changes any more


@dataclass(frozen=True, eq=False)
class RankProblem:
    """Made by ``pose_ranks``, which makes sure that there is a solution. ``saving`` is what one parameter less of a
    linear saves of each cost."""

    outline: Outline
    budget: Budget
    dense: Costs
    ceilings: Costs
    linears: Mapping[Linear, LinearOutline]
    saving: Mapping[Linear, Costs]

    def costs(self, ranks: Mapping[Linear, int]) -> Costs:
        """The costs with these linears in two parts."""
        costs = dict(self.dense)
        for linear, rank in ranks.items():
            saved = self.linears[linear].saved(rank)
            costs = {kind: cost - saved * self.saving[linear][kind] for kind, cost in costs.items()}
        return costs

    def met(self, ranks: Mapping[Linear, int]) -> bool:
        costs = self.costs(ranks)
        return all(within(costs[kind], ceiling) for kind, ceiling in self.ceilings.items())

    def price(self, linear: Linear) -> float:
        """How far one parameter less of a linear brings the budget, 1 for all the way, summed over its limits."""
        wanted = {kind: self.dense[kind] - ceiling for kind, ceiling in self.ceilings.items()}
        return max(sum(self.saving[linear][kind] / amount for kind, amount in wanted.items()), 1e-30)


def pose_ranks(
    outline: Outline, budget: Budget, target: Target = Target.ANY, *, stack: str | None = None
) -> RankProblem:
    """The task of meeting ``budget`` by taking linears apart, each of them left with a rank of at least 1.

    Raises InputError where it has no solution, before anything is measured."""
    check_target(target, outline)
    if target in (Target.UNIFORM, Target.DECI):
        raise InputError(f"target {target} cannot carry linears in two parts; use target remote or any")
    if budget.until_cliff:
        raise InputError(f"budget {budget} follows a path of single steps, and ranks have none: give an amount")
    model = CostModel(outline)
    linears = {
        (address, path): linear
        for address, sublayer in outline.sublayers()
        for path, linear in sublayer.linears.items()
        if linear.useful and stack in (None, address.stack)
    }
    where = f"this {outline.family} model" if stack is None else f"stack {stack} of this {outline.family} model"
    if not linears:
        raise InputError(f"no linear of {where} can be taken apart")
    saving = {}
    for (address, path), linear in linears.items():
        least = model.of((), factors=[Factorise(unit=address, linear=path, rank=1)])
        saving[address, path] = {kind: (model.dense[kind] - least[kind]) / linear.saved(1) for kind in least}
    problem = RankProblem(outline, budget, model.dense, budget.ceilings(model.dense), linears, saving)
    costs = problem.costs(dict.fromkeys(linears, 1))
    for kind, ceiling in problem.ceilings.items():
        if not within(costs[kind], ceiling):
            raise InputError(
                f"budget {budget} cannot be met: with every linear of {where} at rank 1, "
                f"{kind} is still {costs[kind] / model.dense[kind]:.3f} of dense"
            )
    return problem


def spread(problem: RankProblem, energies: Mapping[Linear, tuple[Tensor, float]], how: Spread) -> dict[Linear, int]:
    """A rank for each linear that is taken apart. ``energies``: of its first directions, falling, and of all; a linear
    without is unknown and stays as it is.

    - ``uniform``: every linear keeps the same share of its parameters, rank = share * o i / (o + i), rounded down;
    - ``global``: the ranks that together lose least, where a linear loses the share of its output's energy that lies
      in the directions that are gone. By the method of Lagrange: at a price for a parameter every linear takes the rank
      at which its loss and the price of what it keeps are least together, or stays as it is; the price is halved in
      until the budget is met, and what is left of it goes to the directions with most energy for a parameter. Exact but
      for the last step (Everett 1963).

    InputError where the linears with energies do not suffice.
    """
    known = {linear: outline for linear, outline in problem.linears.items() if linear in energies}
    if not problem.met(dict.fromkeys(known, 1)):
        raise InputError(f"budget {problem.budget} cannot be met with the {len(known)} linears that were reached")
    if how == "uniform":
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            share = (low + high) / 2
            low, high = (share, high) if problem.met(_even(known, share)) else (low, share)
        return _even(known, low)
    choices = {linear: _choice(problem, linear, *energies[linear]) for linear in known}
    low, high = -80.0, 80.0  # logarithms of the price
    for _ in range(_HALVINGS):
        price = (low + high) / 2
        low, high = (low, price) if problem.met(_at(choices, price)) else (price, high)
    return _filled(problem, _at(choices, high), energies)


def _even(linears: Mapping[Linear, LinearOutline], share: float) -> dict[Linear, int]:
    ranks = {linear: max(int(share * o.params / (o.outputs + o.inputs)), 1) for linear, o in linears.items()}
    return {linear: rank for linear, rank in ranks.items() if rank <= linears[linear].useful}


def _choice(problem: RankProblem, linear: Linear, energies: Tensor, total: float) -> tuple[Tensor, Tensor]:
    """For rank 1 and on, and last of all for the linear as it is: the share of the energy that is lost, and the price
    of what is left."""
    outline = problem.linears[linear]
    kept = energies.double().cumsum(0) / max(total, 1e-30)
    lost = torch.cat([(1 - kept).clamp(min=0), torch.zeros(1, dtype=torch.float64)])
    ranks = torch.arange(1, len(energies) + 1, dtype=torch.float64)
    sizes = torch.cat([ranks * (outline.outputs + outline.inputs), torch.tensor([float(outline.params)])])
    return lost, sizes * problem.price(linear)


def _at(choices: Mapping[Linear, tuple[Tensor, Tensor]], price: float) -> dict[Linear, int]:
    factor = torch.tensor(price, dtype=torch.float64).exp()
    best = {linear: int((lost + factor * sizes).argmin()) for linear, (lost, sizes) in choices.items()}
    return {linear: at + 1 for linear, at in best.items() if at + 1 < len(choices[linear][0])}


def _filled(
    problem: RankProblem, ranks: dict[Linear, int], energies: Mapping[Linear, tuple[Tensor, float]]
) -> dict[Linear, int]:
    """One rank more here and there, as long as the budget is met."""
    open_, ranks = set(ranks), dict(ranks)

    def gain(linear: Linear) -> float:
        values, total = energies[linear]
        outline = problem.linears[linear]
        return values[ranks[linear]].item() / max(total, 1e-30) / (outline.outputs + outline.inputs)

    while open_ := {linear for linear in open_ if ranks[linear] < problem.linears[linear].useful}:
        best = max(sorted(open_), key=gain)
        ranks[best] += 1
        if not problem.met(ranks):
            ranks[best] -= 1
            open_.remove(best)
    return ranks
