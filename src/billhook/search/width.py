"""How many inner units go from which sublayer: from their scores to what is kept under a budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Literal

import torch
from torch import Tensor

from billhook.measure.cost import CostModel, Costs
from billhook.plan.address import Address
from billhook.plan.budget import Budget, within
from billhook.plan.check import check_target
from billhook.plan.errors import InputError
from billhook.plan.outline import InnerOutline, Outline
from billhook.plan.plan import Keep
from billhook.plan.target import Target
from billhook.search.one_shot import Per

Allocation = Literal["uniform", "global", "standardised", "shared", "measured"]
Kind = Literal["neuron", "group", "expert"]
KINDS: Mapping[str, tuple[Kind, ...]] = {
    "neuron": ("neuron",),
    "group": ("group",),
    "width": ("neuron", "group"),
    "expert": ("expert",),
}


@dataclass(frozen=True, eq=False)
class Space:
    """A sublayer whose units may go: ``left`` says how many may be left, from all of them on down; of each of ``parts``
    equal runs of units as many stay as of the others. ``saving`` is what one unit costs."""

    address: Address
    kind: Kind
    count: int
    left: tuple[int, ...]
    parts: int
    saving: Costs


@dataclass(frozen=True)
class WidthProblem:
    """Made by ``pose_width``, which makes sure that there is a solution. ``level``: all sublayers of a kind must be
    left with equally many units, as an ordinary checkpoint has them. ``start`` are the costs before any unit has gone:
    those of the dense model, unless whole blocks went first (see ``search.coarse``)."""

    outline: Outline
    budget: Budget
    dense: Costs
    start: Costs
    ceilings: Costs
    spaces: tuple[Space, ...]
    level: bool

    def met(self, costs: Costs) -> bool:
        return all(within(costs[kind], ceiling) for kind, ceiling in self.ceilings.items())

    @property
    def share(self) -> float:
        """Which share of all units has to go, for the limit that asks for most."""
        wanted = {kind: self.start[kind] - ceiling for kind, ceiling in self.ceilings.items()}
        return max(wanted[k] / max(sum(s.count * s.saving[k] for s in self.spaces), 1e-30) for k in wanted)


def pose_width(
    outline: Outline,
    budget: Budget,
    unit: str = "neuron",
    target: Target = Target.ANY,
    *,
    stack: str | None = None,
    multiple_of: int = 1,
    costs: CostModel | None = None,
) -> WidthProblem:
    """The task of meeting ``budget`` by making sublayers narrower: by ``neuron``s, KV ``group``s, both (``width``) or
    ``expert``s, so that the number of neurons left is a multiple of ``multiple_of`` wherever any have gone. Every
    sublayer keeps at least one such multiple, one group, as many experts as a token uses, or what its config asks for.
    ``costs`` are those of another workload than the usual one.

    Raises InputError where it has no solution, before anything is measured.
    """
    check_target(target, outline)
    if budget.until_cliff:
        raise InputError(f"budget {budget} follows a path of single steps, and width has none: give an amount")
    kinds, asked = KINDS[unit], " or ".join(KINDS[unit])
    if target is Target.DECI:  # loaders want one number of query heads, and know no experts
        kinds = tuple(kind for kind in kinds if kind == "neuron")
    costs = costs or CostModel(outline)
    dense = costs.dense
    spaces = []
    for address, sublayer in outline.sublayers():
        for kind in kinds:
            inner = sublayer.inner.get(kind)
            if inner is None or stack not in (None, address.stack) or (target is Target.UNIFORM and not inner.key):
                continue
            narrower = costs.of((), [Keep(unit=address, inner=kind, indices=(0,))])
            saving = {k: (dense[k] - narrower[k]) / max(inner.count - 1, 1) for k in dense}
            left = _may_be_left(inner, multiple_of if kind == "neuron" else 1, target)
            spaces.append(Space(address, kind, inner.count, left, inner.parts, saving))
    where = f"this {outline.family} model" if stack is None else f"stack {stack} of this {outline.family} model"
    if not any(len(space.left) > 1 for space in spaces):
        parts = {"attention" if kind == "group" else "mlp" for kind in kinds}
        inside = [sublayer for address, sublayer in outline.sublayers() if address.sublayer in parts]
        units = [s.inner[kind] for s in inside for kind in kinds if kind in s.inner]
        whole = {f"all {unit.count} must stay" for unit in units if unit.least == unit.count}
        reasons = sorted({s.rigid for s in inside if s.rigid} | whole)
        more = f" ({reasons[0]})" if reasons else ""
        raise InputError(f"no {asked} of {where} can go for target {target}{more}")
    problem = WidthProblem(
        outline, budget, dense, dense, budget.ceilings(dense), tuple(spaces), target is Target.UNIFORM
    )
    least = less(dense, [(space, space.count - space.left[-1]) for space in spaces])
    for kind_, ceiling in problem.ceilings.items():
        if not within(least[kind_], ceiling):
            raise InputError(
                f"budget {budget} cannot be met: with every {asked} of {where} gone that may go, "
                f"{kind_} is still {least[kind_] / dense[kind_]:.3f} of dense"
            )
    return problem


def allocate(
    problem: WidthProblem,
    scores: Mapping[Address, Tensor],
    allocation: Allocation = "global",
    *,
    per: Per = "unit",
    shares: Mapping[Address, float] | None = None,
    prices: Mapping[Address, Tensor] | None = None,
) -> tuple[tuple[Keep, ...], Costs]:
    """The least important units go until the budget is met; what is kept, and what that costs.

    Within a sublayer the order is that of ``scores`` (high is important; ties by number; a sublayer without scores is
    unknown and stays as it is, and so does a unit whose score is infinite). Between sublayers units are set against
    each other by

    - ``uniform``: their place in their own sublayer, so that all lose the same share;
    - ``global``: the score itself (``per`` budget: by what the unit gains of it, such as a parameter);
    - ``standardised``: the score less its mean in the sublayer, by its standard deviation (FLAP, arXiv 2312.11983);
    - ``shared``: their place in their own sublayer by ``shares``, so that sublayers lose shares of their units that are
      to each other as these;
    - ``measured``: their price by ``prices`` (see ``search.levels``; ``per`` budget as for ``global``).

    Where only multiples may be left, units go in batches, with the mean of their figures. The last batches come back
    where the budget does not need them, so it is met within one of the smallest. Raises InputError for a score that is
    no number, for other figures than units, and where what has scores does not suffice.
    """
    spaces = [space for space in problem.spaces if space.address in scores]
    for space in spaces:
        figures = scores[space.address]
        if figures.shape != (space.count,) or not (torch.isfinite(figures) | (figures == math.inf)).all():
            raise InputError(f"the scores of {space.address} are not {space.count} finite numbers")
    if problem.level and allocation != "uniform":
        raise InputError("an ordinary checkpoint has equal widths: allocate them uniform, or use target remote")
    if allocation == "shared" and shares is None:
        raise InputError("a shared allocation needs the shares")
    if allocation == "measured" and prices is None:
        raise InputError("a measured allocation needs the prices")
    orders = {space: order_of(scores[space.address], space.parts) for space in spaces}
    batches: list[tuple[float, int, list[tuple[Space, int]]]] = []
    for number, space in enumerate(spaces):
        if prices is not None:
            ranks = prices[space.address]
        else:
            ranks = _ranks(scores[space.address], orders[space], allocation, space, shares or {})
        weight = gain_of(problem, space) if per == "budget" else 1.0
        pairs = _pairs(space)[: steps_known(space, scores[space.address])]
        means = [ranks[space.count - a : space.count - b].mean().item() / weight for a, b in pairs]
        rising = accumulate(means, max)  # a batch cannot go before those of lower rank in its sublayer
        batches += [(rank, 0 if problem.level else number, [(space, step)]) for step, rank in enumerate(rising, 1)]
    batches = _levelled(batches, problem.spaces) if problem.level else batches
    batches.sort(key=lambda batch: batch[:2])
    return _cut(problem, orders, batches)


def _cut(
    problem: WidthProblem, orders: Mapping[Space, Tensor], batches: list[tuple[float, int, list[tuple[Space, int]]]]
) -> tuple[tuple[Keep, ...], Costs]:
    steps = dict.fromkeys(orders, 0)
    costs, gone = problem.start, 0
    while not problem.met(costs):
        if gone == len(batches):
            raise InputError(
                f"budget {problem.budget} cannot be met with the units that have scores, in {len(orders)} sublayers: "
                f"the others stay (what the calibration never reached, and more text may reach; where neurons are "
                f"merged, half of them)"
            )
        costs = _move(steps, costs, batches[gone][2], 1)
        gone += 1
    for _, _, batch in reversed(batches[:gone]):
        if all(steps[space] == step for space, step in batch):  # the last of its sublayer that went
            before = _move(dict(steps), costs, batch, -1)
            if problem.met(before):
                costs = _move(steps, costs, batch, -1)
    keeps = []
    for space, step in steps.items():
        if step:
            keeps.append(keep_of(space, orders[space], space.left[step]))
    return tuple(keeps), costs


def keep_of(space: Space, order: Tensor, left: int) -> Keep:
    """What is left if units go in an order until so many are left."""
    kept = order[space.count - left :].sort().values
    return Keep(unit=space.address, inner=space.kind, indices=tuple(kept.tolist()))


def _move(steps: dict[Space, int], costs: Costs, batch: list[tuple[Space, int]], sign: int) -> Costs:
    """Let the units of a batch go, or come back."""
    for space, step in batch:
        steps[space] += sign
        costs = less(costs, [(space, sign * (space.left[step - 1] - space.left[step]))])
    return costs


def less(costs: Costs, units: list[tuple[Space, int]]) -> Costs:
    """What is left of costs when so many units of these sublayers go."""
    for space, number in units:
        costs = {kind: cost - number * space.saving[kind] for kind, cost in costs.items()}
    return costs


def gain_of(problem: WidthProblem, space: Space) -> float:
    """How far one unit brings the budget, 1 for all the way from dense, summed over its limits."""
    wanted = {kind: problem.dense[kind] - ceiling for kind, ceiling in problem.ceilings.items()}
    return max(sum(space.saving[kind] / amount for kind, amount in wanted.items()), 1e-30)


def _pairs(space: Space) -> list[tuple[int, int]]:
    """From how many to how many are left in each step."""
    return list(zip(space.left, space.left[1:], strict=False))


def steps_known(space: Space, scores: Tensor) -> int:
    """How many steps a sublayer may go down before a unit of unknown (infinite) score would go."""
    known = scores[order_of(scores, space.parts)].isfinite()
    return sum(
        1 for _ in takewhile(lambda pair: known[space.count - pair[0] : space.count - pair[1]].all(), _pairs(space))
    )


def order_of(scores: Tensor, parts: int) -> Tensor:
    """Unit numbers, least important first, in turn from each of the equal runs."""
    runs = scores.double().reshape(parts, -1)
    places = runs.argsort(dim=1, stable=True) + torch.arange(parts)[:, None] * runs.shape[1]
    return places.T.reshape(-1)


def _ranks(
    scores: Tensor, order: Tensor, allocation: Allocation, space: Space, shares: Mapping[Address, float]
) -> Tensor:
    """What the units of a sublayer are set against others by, in the order in which they go."""
    place = torch.arange(1, space.count + 1, dtype=torch.float64) / space.count
    match allocation:
        case "uniform":
            return place
        case "shared":
            return place / max(shares[space.address], 1e-30)
        case "standardised":
            scores = scores.double()
            known = scores[scores.isfinite()]
            scores = (scores - known.mean()) / known.std(correction=0).clamp(min=1e-30)
    return scores.double()[order]


def _may_be_left(inner: InnerOutline, multiple_of: int, target: Target) -> tuple[int, ...]:
    fits = [
        n
        for n in range(inner.count - 1, max(inner.least, 1) - 1, -1)
        if n % multiple_of == 0
        and n % inner.parts == 0
        and not (target is Target.UNIFORM and inner.divides and inner.divides % (n * inner.amount))
    ]
    return (inner.count, *fits)


def _levelled(
    batches: list[tuple[float, int, list[tuple[Space, int]]]], spaces: tuple[Space, ...]
) -> list[tuple[float, int, list[tuple[Space, int]]]]:
    """The same step of all sublayers of a kind as one batch, as long as all of them can go so far."""
    all_of = Counter((space.address.stack, space.kind) for space in spaces)
    together: dict[tuple[str, Kind, int], tuple[float, int, list[tuple[Space, int]]]] = {}
    for rank, number, batch in batches:
        for space, step in batch:
            key = (space.address.stack, space.kind, step)
            _, _, members = together.setdefault(key, (rank, number, []))
            members.append((space, step))
    return [batch for (stack, kind, _), batch in together.items() if len(batch[2]) == all_of[stack, kind]]
