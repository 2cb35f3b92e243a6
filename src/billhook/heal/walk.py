"""The dense stream and the healed one, walking through a stack side by side, one place at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from billhook.heal.places import Place
from billhook.heal.ridge import Moments, solve
from billhook.heal.stepping import Stepper
from billhook.heal.writes import NOT_ADDED, Write, scale_of, writes_of
from billhook.measure.patch import Forward
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.record import Refit

Progress = Callable[[str, int, int], None]
HELD_BACK = 1 / 8
_SMALLEST = 1e-12  # energy of a token, against division by zero


class Walk:
    """What has been found so far; see ``Healing``. The model itself is never changed: once its writes are refitted, a
    place is not run again."""

    def __init__(self, model: nn.Module, stepper: Stepper, drops: frozenset[Address]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.refits: list[Refit] = []
        self.left_alone: dict[str, str] = {}
        self.tokens = self.work = 0
        self._model, self._stepper, self._drops = model, stepper, drops
        self._held: list[Tensor] = []
        self._counted: set[tuple[str, int]] = set()

    def through(self, places: list[Place], progress: Progress | None) -> None:
        """From the first block to the last. A place that stays waits until the dense stream is where the next one reads
        it; as long as nothing is missing, the streams are one and the same."""
        dense = [self._stepper.enter(i) for i in range(len(self._stepper.batches))]
        self._held = held_back([len(stream) for stream in dense])
        self.tokens = sum(stream.shape[0] * stream.shape[1] for stream in dense)
        cut, waiting, gap = dense, None, False
        for index, place in enumerate(places):
            if place.acts(self._drops):
                if waiting is not None:
                    cut = self._heal(waiting, cut, dense) if gap else dense
                waiting = place
            gap = gap or len(place.kept(self._drops)) < len(place.sublayers)
            dense = self._ahead(place, dense)
            if progress is not None:
                progress("healing", index + 1, len(places))
        if waiting is not None and gap:
            self._heal(waiting, cut, dense)

    def _ahead(self, place: Place, streams: list[Tensor]) -> list[Tensor]:
        """The dense stream, one place on."""
        self._count("dense", place)
        silent = place.silent(frozenset())
        return [self._stepper.run(i, place, stream, silent) for i, stream in enumerate(streams)]

    def _heal(self, place: Place, cut: list[Tensor], target: list[Tensor]) -> list[Tensor]:
        """The cut stream, one place on, with the writes of the place refitted one after the other."""
        self._count("cut", place)
        scales = self._scales(place, cut[0])
        inputs: dict[str, list[Tensor]] = {write.weight: [] for write, _ in scales}
        hooks = [(write.linear, partial(_keep_input, inputs[write.weight])) for write, _ in scales]
        silent = place.silent(self._drops)
        after = [self._stepper.run(i, place, stream, silent, hooks) for i, stream in enumerate(cut)]
        for write, scale in scales:
            after = self._refit(write, scale, inputs.pop(write.weight), after, target)
        return after

    def _scales(self, place: Place, stream: Tensor) -> list[tuple[Write, Tensor]]:
        """The writes of a place that can be refitted, with what they are multiplied with on the way to the stream."""

        def run(write: Write, hook: Forward | None) -> Tensor:
            hooks = [] if hook is None else [(write.linear, hook)]
            return self._stepper.run(0, place, stream, place.silent(self._drops), hooks)

        found = []
        for sublayer in place.kept(self._drops):
            writes, left = writes_of(self._model, sublayer, place.mixed)
            self.left_alone |= left
            for write in writes:
                scale = scale_of(partial(run, write))
                if scale is None:
                    self.left_alone[write.weight] = NOT_ADDED
                else:
                    found.append((write, scale))
        return found

    def _refit(
        self, write: Write, scale: Tensor, inputs: list[Tensor], after: list[Tensor], target: list[Tensor]
    ) -> list[Tensor]:
        """Refit one linear; the stream with what it writes now."""
        fit, held = Moments(), Moments()
        for i, (h, now, goal) in enumerate(zip(inputs, after, target, strict=True)):
            real = self._stepper.real(i, goal)
            back = self._held[i].to(real.device)[:, None]
            for moments, chosen in ((fit, real & ~back), (held, real & back)):
                dense = goal[chosen].float()
                weight = 1 / dense.square().sum(-1).clamp(min=_SMALLEST)
                moments.add(write.inputs(h.reshape(*real.shape, -1)[chosen]), dense - now[chosen].float(), weight)
        solution = solve(fit, held)
        before = held.energy / held.tokens
        if solution is None:
            self.refits.append(Refit(weight=write.weight, before=before, after=before, penalty=None))
            return after
        error = solution.error / held.tokens
        self.refits.append(Refit(weight=write.weight, before=before, after=error, penalty=solution.penalty))
        new = write.changed(solution.change / scale)
        self.tensors |= new
        more = (write.written(h, new).reshape(now.shape) for h, now in zip(inputs, after, strict=True))
        return [(now.float() + scale * step).to(now.dtype) for now, step in zip(after, more, strict=True)]

    def _count(self, side: str, place: Place) -> None:
        if (side, place.number) not in self._counted:
            self._counted.add((side, place.number))
            self.work += self.tokens


def held_back(rows: list[int]) -> list[Tensor]:
    """Which rows of each batch are held back, bool [rows]: the last eighth of all, at least one and never all."""
    total = sum(rows)
    if total < 2:
        raise InputError("healing needs at least two windows: one to fit on and one to hold back")
    kept = total - max(1, round(HELD_BACK * total))
    return list(torch.split(torch.arange(total) >= kept, rows))


def _keep_input(kept: list[Tensor], module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    kept.append(args[0])
