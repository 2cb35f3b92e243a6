"""Healing in closed form where hidden channels are gone: two streams of two widths, walking side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from billhook.anatomy.types import Anatomy
from billhook.data import Windows
from billhook.heal.healing import Healing, healed
from billhook.heal.refit.peers import Peers
from billhook.heal.refit.places import places
from billhook.heal.refit.stepping import Stepper
from billhook.heal.refit.walk import Walk
from billhook.heal.refit.widths import inner_left, whole
from billhook.measure.batches import Batch, batches_of
from billhook.measure.patch import observing
from billhook.plan.address import Address
from billhook.plan.plan import Keep, Plan
from billhook.surgery.apply import apply
from billhook.surgery.live import channels_of, drops_of, keeps_of
from billhook.surgery.simulate import simulate

Progress = Callable[[str, int, int], None]


def channel_form(
    model: nn.Module,
    anatomy: Anatomy,
    plan: Plan | Iterable[Address],
    source: Windows | Iterable[Batch],
    progress: Progress | None,
    peers: Peers,
) -> Healing:
    """New weights by least squares for reads and writes of a model that loses hidden channels. The model stays as it
    is.

    As ``closed_form``, with two streams of two widths: the dense one z, and that of the cut model as healed so far. The
    reads of a sublayer (q, k, v; gate, up) are given x there, over the channels that stay; the S [kept, all] that
    minimises the error of x S against z, with a penalty that draws to the channels as they are, is folded into each of
    them: W z becomes W S'x. So what the channels that are gone held is read off those that stay, as far as it can be
    guessed from them. Then the writes, or the norms behind them, are refitted so that the stream comes out as the kept
    channels of the dense one.

    Left alone, with the reason: reads and writes that are fused experts, writes behind a norm. The head and the
    embedding are one tensor in many models and stay as they are.

    Cost: that of ``closed_form``, all places being behind the gap; processes share it alike. Memory: the cut model
    beside the dense one. Raises InputError for fewer than two windows, and where a stream is not finite.
    """
    drops, keeps, channels = drops_of(plan, anatomy), keeps_of(plan, anatomy), channels_of(plan, anatomy)
    (edit,) = channels
    batches = list(batches_of(source, model))
    stack = anatomy.stack(edit.stack)
    thin = apply(model, anatomy, Plan.of([], keeps=keeps, channels=channels))
    walk = _ThinWalk(model, anatomy, Stepper(model, stack, batches), drops, keeps, peers)
    walk.beside(thin, Stepper(thin, stack, batches), edit.indices)
    walk.through(places(stack), progress)
    tensors = peers.same(whole(model, anatomy, keeps, walk.tensors, channels))
    healing = Healing(tensors, tuple(walk.refits), walk.left_alone, walk.tokens, walk.work)
    smaller = Plan.of(drops, keeps=keeps, channels=channels)
    return _judged(model, anatomy, batches, walk.held, smaller, healing, peers)


class _ThinWalk(Walk):
    """The walk of ``closed_form`` with the cut stream in a model of its own, which is narrower; every place is behind
    the gap."""

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        stepper: Stepper,
        drops: frozenset[Address],
        keeps: tuple[Keep, ...],
        peers: Peers,
    ) -> None:
        super().__init__(model, anatomy, stepper, drops, (), peers)
        self._inner = keeps

    def beside(self, thin: nn.Module, stepper: Stepper, kept: Iterable[int]) -> None:
        """The model that the cut stream walks through, and the channels that it has."""
        self._model, self._stepper = thin, stepper
        stepper.like(self._dense_stepper)
        self._kept = torch.tensor(tuple(kept), device=next(thin.parameters()).device)

    def _whole(self, reads: dict[str, nn.Module]) -> dict[str, Tensor]:
        return {name: inner_left(self._dense_model, self._anatomy, self._inner, name) for name in reads}


def _judged(
    model: nn.Module,
    anatomy: Anatomy,
    batches: list[dict[str, Any]],
    held: list[Tensor],
    plan: Plan,
    healing: Healing,
    peers: Peers,
) -> Healing:
    """As ``verdict.judged``, by what the whole models put out: the stream that is left has other channels. Of a model
    without a head for tokens it is the squared error of its output, relative to the dense one; where that is the stream
    itself, over the channels that stay."""
    if not healing.tensors:
        return healing
    (edit,) = plan.channels
    before = now = count = 0.0
    for inputs, rows in zip(batches, held, strict=True):
        if not rows.any():
            continue
        some = {
            k: v[rows.to(v.device)] if isinstance(v, Tensor) and len(v) == len(rows) else v for k, v in inputs.items()
        }
        with observing(model):
            dense = model(**some)[0]
            with simulate(model, anatomy, plan):
                cut = model(**some)[0]
            with healed(model, healing), simulate(model, anatomy, plan):
                better = model(**some)[0]
        speaks = anatomy.head is not None and dense.ndim == 3
        dense = dense if dense.shape == cut.shape else dense[..., list(edit.indices)]
        mask = some.get("attention_mask")
        if mask is None or mask.shape != dense.shape[:-1]:
            mask = torch.ones(dense.shape[:-1], device=dense.device)
        real = mask.bool()
        for one, a, b in zip(dense[real].split(128), cut[real].split(128), better[real].split(128), strict=True):
            before, now = before + _apart(one, a, speaks), now + _apart(one, b, speaks)
        count += int(real.sum())
    before, now, count = peers.added(before, now, count)
    return healing.judged(before / count, now / count)


def _apart(dense: Tensor, other: Tensor, speaks: bool) -> float:
    """Summed over positions: the divergence from the dense distribution in nats, or the relative squared error."""
    one, two = dense.float(), other.float()
    if not two.isfinite().all():
        return float("inf")
    if not speaks:
        return ((two - one).square().sum(-1) / one.square().sum(-1)).sum(dtype=torch.float64).item()
    p, q = log_softmax(one, -1), log_softmax(two, -1)
    return (p.exp() * (p - q)).sum(dtype=torch.float64).item()
