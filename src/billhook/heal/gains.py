"""One gain for every branch that stays, folded into the weights through which it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from billhook.anatomy.types import Anatomy, Sublayer
from billhook.anatomy.undo import Undo
from billhook.data import Windows
from billhook.heal.closed_form import require_healable
from billhook.heal.divergence import held_back
from billhook.heal.healing import Healing, put, require_no_masks
from billhook.heal.places import Place, places
from billhook.heal.stepping import Stepper
from billhook.measure.batches import Batch, batches_of
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.record import Refit
from billhook.surgery.live import drops_of

Progress = Callable[[str, int, int], None]
NOT_LINEAR = "what it writes does not grow with its weights: it is normed on its way to the stream"
_TOLERANCE = 0.03
_SMALLEST = 1e-12


def branch_gains(
    model: nn.Module,
    anatomy: Anatomy,
    plan: Plan | Iterable[Address],
    source: Windows | Iterable[Batch],
    progress: Progress | None = None,
) -> Healing:
    """A gain g for each sublayer that stays behind the first gap, in closed form: what it writes, b, becomes g b.

    The dense stream and that of the cut model walk side by side, as in ``closed_form``. With r what the cut stream
    behind the sublayer lacks of the dense one where the next sublayer reads it, g = 1 + d with the d that minimises

        sum over tokens of w |r - d b|^2,    w = 1 / |dense stream|^2;

    the sublayers of a parallel block are solved for together. A gain is only taken if it lowers the same error on the
    last eighth of the windows. One number a branch is too little to overfit, and the weakest repair there is.

    Source: a scale on every residual branch as in "On residual network depth", which derives why branches must be
    scaled with depth and fits none; where the scales of a shortened network come from is our choice. Folded into the
    write weights and their biases, experts included. Left alone: branches behind a norm, which undoes any gain. Cost:
    the dense blocks once, those behind the first gap at most three times. Raises InputError as ``closed_form`` does.
    """
    require_no_masks(plan, "a gain")
    drops = drops_of(plan, anatomy)
    stacks = sorted({unit.stack for unit in drops})
    if len(stacks) != 1:
        raise InputError(f"gains take one stack at a time; the plan drops {' and '.join(stacks) or 'nothing'}")
    require_healable(anatomy)
    stack = anatomy.stack(stacks[0])
    stepper = Stepper(model, stack, list(batches_of(source, model)))
    walk = _Gains(model, stepper, drops)
    walk.through(places(stack), progress)
    return Healing(walk.tensors, tuple(walk.refits), walk.left_alone, walk.tokens, walk.work)


class _Gains:
    def __init__(self, model: nn.Module, stepper: Stepper, drops: frozenset[Address]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.refits: list[Refit] = []
        self.left_alone: dict[str, str] = {}
        self.tokens = self.work = 0
        self._model, self._stepper, self._drops = model, stepper, drops
        self._held: list[Tensor] = []
        self._names = {name for name, _ in model.named_parameters()}

    def through(self, order: list[Place], progress: Progress | None) -> None:
        dense = [self._stepper.enter(i) for i in range(len(self._stepper.batches))]
        self._held = held_back([len(stream) for stream in dense])
        self.tokens = sum(stream.shape[0] * stream.shape[1] for stream in dense)
        cut, waiting, gap = dense, None, False
        for number, place in enumerate(order):
            if place.acts(self._drops):
                if waiting is not None:
                    cut = self._fit(waiting, cut, dense) if gap else dense
                waiting = place
            gap = gap or len(place.kept(self._drops)) < len(place.sublayers)
            dense = self._run(place, dense, place.silent(frozenset()))
            if progress is not None:
                progress("gains", number + 1, len(order))
        if waiting is not None and gap:
            self._fit(waiting, cut, dense)

    def _run(self, place: Place, streams: list[Tensor], silent: Iterable[Sublayer]) -> list[Tensor]:
        self.work += self.tokens
        silent = tuple(silent)
        return [self._stepper.run(i, place, stream, silent) for i, stream in enumerate(streams)]

    def _fit(self, place: Place, cut: list[Tensor], target: list[Tensor]) -> list[Tensor]:
        """The cut stream, one place on, with gains where they help."""
        after = self._run(place, cut, place.silent(self._drops))
        usable = [s for s in place.kept(self._drops) if self._grows(place, s, cut[0])]
        if not usable:
            return after
        written = [self._written(place, s, cut, after) for s in usable]
        fit, held = (self._moments(written, after, target, back) for back in (False, True))
        changes = torch.linalg.lstsq(fit[0], fit[1][:, None]).solution[:, 0]
        before = held[2]
        error = before - float(2 * changes @ held[1] - changes @ held[0] @ changes)
        taken = error < before
        scale = max(held[3], 1)
        for sublayer, change in zip(usable, changes.tolist() if taken else [0.0] * len(usable), strict=True):
            if taken:
                self.tensors |= self._scaled(sublayer, 1 + change)
            self.refits += [
                Refit(
                    weight=name, before=before / scale, after=min(error, before) / scale, penalty=0.0 if taken else None
                )
                for name in sublayer.writes
            ]
        if not taken:
            return after
        for i, stream in enumerate(after):
            step = sum(change * parts[i] for change, parts in zip(changes.tolist(), written, strict=True))
            after[i] = (stream.float() + step).to(stream.dtype)
        return after

    def _written(self, place: Place, sublayer: Sublayer, cut: list[Tensor], after: list[Tensor]) -> list[Tensor]:
        """What a sublayer adds to the cut stream, in float32."""
        if len(place.kept(self._drops)) > 1:
            after = self._run(place, cut, [s for s in place.block.sublayers if s is not sublayer])
        return [there.float() - here.float() for here, there in zip(cut, after, strict=True)]

    def _grows(self, place: Place, sublayer: Sublayer, stream: Tensor) -> bool:
        """Whether the branch writes twice as much with its write weights doubled. Found out by trying."""
        others = [s for s in place.block.sublayers if s is not sublayer]
        before = stream.float()
        once = self._stepper.run(0, place, stream, others).float() - before
        undo = Undo()
        try:
            for name, tensor in self._scaled(sublayer, 2.0).items():
                put(self._model, name, tensor, undo)
            twice = self._stepper.run(0, place, stream, others).float() - before
        finally:
            undo.restore()
        grows = bool((twice - 2 * once).norm() < _TOLERANCE * (2 * once).norm())
        if not grows:
            self.left_alone |= dict.fromkeys(sublayer.writes, NOT_LINEAR)
        return grows

    def _scaled(self, sublayer: Sublayer, gain: float) -> dict[str, Tensor]:
        """The write weights and their biases, times a gain."""
        names = [
            n for write in sublayer.writes for n in (write, f"{write.removesuffix('weight')}bias", f"{write}_bias")
        ]
        old = {name: self._model.get_parameter(name).detach() for name in names if name in self._names}
        return {name: (gain * tensor.float()).to(tensor.dtype) for name, tensor in old.items()}

    def _moments(
        self, written: list[list[Tensor]], after: list[Tensor], target: list[Tensor], back: bool
    ) -> tuple[Tensor, Tensor, float, int]:
        """Sums over the tokens that are held back, or over the others: of products of what is written, of these with
        what is lacking, of the energy of that; and their number. Weighted, in float64."""
        count = len(written)
        square, cross = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        energy, tokens = 0.0, 0
        for i, (now, goal) in enumerate(zip(after, target, strict=True)):
            real = self._stepper.real(i, now)
            rows = real & (self._held[i].to(real.device)[:, None] == back)
            lacks = (goal.float() - now.float())[rows]
            weight = 1 / goal[rows].float().square().sum(-1).clamp(min=_SMALLEST)
            parts = [part[i][rows] for part in written]
            for a, one in enumerate(parts):
                cross[a] += ((one * lacks).sum(-1) * weight).sum(dtype=torch.float64).cpu()
                for b, other in enumerate(parts):
                    square[a, b] += ((one * other).sum(-1) * weight).sum(dtype=torch.float64).cpu()
            energy += (lacks.square().sum(-1) * weight).sum(dtype=torch.float64).item()
            tokens += len(lacks)
        return square, cross, energy, tokens
