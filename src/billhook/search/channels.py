"""How many hidden channels of the residual stream go, and which: from their scores to what is kept under a budget."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

import torch
from torch import Tensor

from billhook.measure.cost import CostModel, Costs
from billhook.plan.budget import Budget, within
from billhook.plan.check import check_target
from billhook.plan.errors import InputError
from billhook.plan.outline import Outline
from billhook.plan.plan import HiddenChannels
from billhook.plan.target import Target


@dataclass(frozen=True)
class ChannelProblem:
    """Made by ``pose_channels``. Of ``count`` channels ``left`` stay: the most with which the budget is met. What that
    costs does not depend on which ones."""

    outline: Outline
    budget: Budget
    dense: Costs
    costs: Costs
    stack: str
    count: int
    left: int


def pose_channels(
    outline: Outline, budget: Budget, target: Target = Target.ANY, *, stack: str, multiple_of: int = 1
) -> ChannelProblem:
    """The task of meeting ``budget`` by a narrower residual stream, the number of channels left being a multiple of
    ``multiple_of`` and of what the model's config takes. Raises InputError where it has no solution, before anything is
    measured."""
    check_target(target, outline)
    if budget.until_cliff:
        raise InputError(f"budget {budget} follows a path of single steps, and width has none: give an amount")
    found = next((s for s in outline.stacks if s.name == stack), None)
    if found is None or not found.channel_multiple:
        reason = found.rigid if found is not None else f"it has no {stack}"
        raise InputError(f"the hidden channels of this {outline.family} model cannot be cut: {reason}")
    if target is Target.DECI:
        raise InputError("hidden channels cannot be cut for target deci: its form has no width of a head of its own")
    step = lcm(multiple_of, found.channel_multiple)
    model = CostModel(outline)
    ceilings = budget.ceilings(model.dense)
    costs = model.dense
    for left in range((found.hidden_size - 1) // step * step, 0, -step):
        edit = HiddenChannels(stack=stack, indices=tuple(range(left)))
        costs = model.of((), channels=[edit])
        if all(within(costs[kind], ceiling) for kind, ceiling in ceilings.items()):
            return ChannelProblem(outline, budget, model.dense, costs, stack, found.hidden_size, left)
    worst = max(ceilings, key=lambda kind: costs[kind] / ceilings[kind])
    raise InputError(
        f"budget {budget} cannot be met: with all but {step} hidden channels gone, {worst} is still "
        f"{costs[worst] / model.dense[worst]:.3f} of dense"
    )


def most_important(problem: ChannelProblem, scores: Tensor) -> HiddenChannels:
    """Those of highest score stay; ties by number, the first stay. InputError for scores that are no numbers."""
    if scores.shape != (problem.count,) or not torch.isfinite(scores).all():
        raise InputError(f"the scores of the channels of {problem.stack} are not {problem.count} finite numbers")
    order = scores.double().argsort(descending=True, stable=True)
    return HiddenChannels(stack=problem.stack, indices=tuple(sorted(order[: problem.left].tolist())))


def random_channels(problem: ChannelProblem, seed: int = 0) -> HiddenChannels:
    """Channels at random."""
    generator = torch.Generator().manual_seed(seed)
    return most_important(problem, torch.rand(problem.count, generator=generator, dtype=torch.float64))


def even_channels(problem: ChannelProblem) -> HiddenChannels:
    """Channels at equal distances: n of N are those numbered floor((i + 1/2) N / n)."""
    n, count = problem.left, problem.count
    return HiddenChannels(stack=problem.stack, indices=tuple((2 * i + 1) * count // (2 * n) for i in range(n)))
