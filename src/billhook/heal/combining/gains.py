"""One scalar for each sublayer that stays, folded into what it writes with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from billhook.anatomy import discover
from billhook.anatomy.types import Anatomy, Sublayer
from billhook.data import Windows
from billhook.heal.gaps import require_own_weights
from billhook.heal.healing import UNTOUCHED, Healing, require_no_channels, require_no_masks
from billhook.heal.held import parted
from billhook.heal.judge import divergences
from billhook.heal.refit.writes import NOT_ADDED
from billhook.measure.gates import Gates
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.surgery import apply

Progress = Callable[[str, int, int], None]
STEPS = 24
RATE = 0.04


def branch_gains(
    model: Any,
    anatomy: Anatomy,
    plan: Plan | Iterable[Address],
    source: Windows,
    progress: Progress | None = None,
) -> Healing:
    """A gain g for each sublayer that ``plan`` leaves, so that it adds g x what it added, folded into the weights
    through which it writes.

    The gains minimise the loss on the text, the weights fixed: Adam on all of them at once, from 1, its rate falling to
    0, the mean over the last third of the steps. They are taken where they lower the loss on the last eighth of the
    windows, which the steps never see; in the end the model must be nearer to the dense one there (KL, nats a token),
    else it is left as cut. Some tens of scalars cannot learn a text by heart.

    Source: a scale on every residual branch as the control of a deep network's paths, from the residual expansion of
    "On residual network depth"; that it should be fitted anew after a removal is the reading of this project.
    (Demo model without blocks 12 to 17, 3,072 tokens, eight windows of WikiText-2: perplexity 93.2 as cut, 72.1 with
    these gains; measured once.)
    Left alone: sublayers behind whose writes stands a norm, which would undo a gain. The result is an ordinary model.

    Cost: a forward and a backward pass of the cut model over one window a step, and six passes over those held back.
    Raises InputError for fewer than two windows, where the loss is not finite, and as ``require_gains`` does.
    """
    require_no_masks(plan, "a gain")
    require_no_channels(plan, "a gain")
    if isinstance(plan, Plan) and (plan.keeps or plan.factors):
        raise InputError("gains are of sublayers as they were; the plan makes some narrower or takes linears apart")
    require_own_weights(plan)
    plan = plan if isinstance(plan, Plan) else Plan.of(plan)
    healing, _ = gains_of(model, anatomy, plan, source, progress=progress)
    return healing.judged(*divergences(model, anatomy, plan, [UNTOUCHED, healing], parted(source)[1]))


def require_gains(anatomy: Anatomy) -> None:
    """InputError if norms stand behind all that a model writes."""
    if not any(_last(s) for s in _sublayers(anatomy)):
        raise InputError(f"norms stand behind all that a {anatomy.family} model writes: gains would change nothing")


def gains_of(
    model: Any,
    anatomy: Anatomy,
    plan: Plan | Iterable[Address],
    source: Windows,
    steps: int = STEPS,
    rate: float = RATE,
    progress: Progress | None = None,
) -> tuple[Healing, dict[Address, float]]:
    """The new write weights, and the gains by address in the cut model; all 1 where they do not lower the loss on what
    is held back."""
    small = apply(model, anatomy, plan)
    inside = discover(small)
    fitted, ids = parted(source)
    kept = Windows.of(ids, source.name)
    require_gains(inside)
    sublayers = _sublayers(inside)
    free = {s.address: s for s in sublayers if _last(s)}
    gates, judge = Gates(small, inside, fitted, list(free)), Gates(small, inside, kept, list(free))
    found = _fitted(gates, steps, rate, progress)
    before, after = (fmean(judge.loss(at, window) for window in range(len(ids))) for at in ({}, found))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    if after < before:
        for unit, gain in found.items():
            for parameter in _written(small, free[unit]):
                tensors[names[id(parameter)]] = (parameter.detach().float() * gain).to(parameter.dtype)
    left = {names[id(small.get_parameter(w))]: NOT_ADDED for s in sublayers if not _last(s) for w in s.writes}
    work = gates.work + judge.work
    return Healing(tensors, (), left, source.tokens, work), found if tensors else dict.fromkeys(found, 1.0)


def _fitted(gates: Gates, steps: int, rate: float, progress: Progress | None) -> dict[Address, float]:
    values = torch.ones(len(gates.units))
    adam = torch.optim.Adam([values], lr=rate, betas=(0.8, 0.95))
    total = torch.zeros_like(values)
    last = max(1, steps // 3)
    for step in range(steps):
        adam.param_groups[0]["lr"] = rate * (1 - step / steps)
        _, slopes = gates.slopes(dict(zip(gates.units, values.tolist(), strict=True)), step)
        values.grad = torch.tensor([slopes[unit] for unit in gates.units])
        adam.step()
        if step >= steps - last:
            total += values
        if progress is not None:
            progress("gains", step + 1, steps)
    return dict(zip(gates.units, (total / last).tolist(), strict=True))


def _sublayers(anatomy: Anatomy) -> list[Sublayer]:
    return [s for block in anatomy.stack("decoder").blocks for s in block.sublayers]


def _last(sublayer: Sublayer) -> bool:
    """Whether nothing but sums comes between the writes and the stream."""
    return all(weight.startswith(f"{sublayer.output}.") for weight in sublayer.writes)


def _written(model: Any, sublayer: Sublayer) -> list[Tensor]:
    """The weights a sublayer writes with, and their biases."""
    own = dict(model.named_parameters())
    biases = [name.removesuffix("weight") + "bias" for name in sublayer.writes if name.endswith(".weight")]
    return [own[name] for name in (*sublayer.writes, *biases) if name in own]
