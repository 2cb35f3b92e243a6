"""Healing by scales: every unit that a narrowing leaves writes a little more or less, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from billhook.anatomy.types import Anatomy, Inner
from billhook.anatomy.undo import Undo
from billhook.data import Windows
from billhook.heal.healing import Healing, put, require_no_channels
from billhook.heal.held import held_back
from billhook.heal.refit.closed_form import require_healable, stack_of
from billhook.heal.refit.places import Place, places
from billhook.heal.refit.stepping import Stepper
from billhook.heal.refit.unit_scales import in_common, missed, scaled, solved
from billhook.heal.refit.verdict import judged
from billhook.heal.refit.watch import keep_input
from billhook.heal.refit.widths import whole
from billhook.heal.refit.writes import Write, writes_of
from billhook.measure.batches import Batch, batches_of
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Keep, Plan
from billhook.plan.record import Refit
from billhook.surgery.live import drops_of, keeps_of
from billhook.surgery.narrow import inner_of, narrow

Progress = Callable[[str, int, int], None]
NOTHING = "scales are tuned for the units that a narrowing leaves, and this plan narrows nothing: use closed-form"
#: Ridge penalties towards 1, relative to the mean energy that a unit writes, from the strongest on.
PENALTIES = (10.0, 1.0, 0.1, 0.01, 1e-3)
_SMALLEST = 1e-12


def mask_tuning(
    model: nn.Module,
    anatomy: Anatomy,
    plan: Plan,
    source: Windows | Iterable[Batch],
    progress: Progress | None = None,
) -> Healing:
    """One scale for each inner unit that a narrowed sublayer keeps, folded into the weight through which it writes.

    The cut stream walks through the stack. Where a sublayer gets narrower it is run with all of its units on the stream
    that comes out of what is healed so far; with what they are given there, the scales s minimise

        sum over tokens of w |W h - sum over kept units of s_u W_u h_u|^2 + penalty m |s - 1|^2,   w = 1 / |stream|^2

    (see ``unit_scales``). So what a sublayer wrote is written again with fewer units, in as many unknowns as there are
    units. The penalty is chosen on the last eighth of the windows, which no fit sees, and the old weights stay where
    none helps there; in the end the whole model is judged on them and the healing refused if it is no nearer to the
    dense one. Dropped blocks and sublayers are not made up for.

    Source: mask tuning, the last step of COMP (arXiv 2501.15255), as least squares a layer (Kwon et al., arXiv
    2204.09656, section 4.3). That the stream is the cut one, the weights w and the ridge are ours. Left alone: fused
    experts. Cost: the blocks once, those that get narrower twice; for n inputs and u units of each of these o n^2 and
    for each penalty u^3 / 3 multiplications. Memory: the model, one stream, the Gram matrix of one sublayer. Raises
    InputError as ``closed_form`` does, and for a plan that narrows nothing.
    """
    require_healable(anatomy, plan)
    require_no_channels(plan, "tuning of masks")
    drops, keeps = drops_of(plan, anatomy), keeps_of(plan, anatomy)
    if not keeps:
        raise InputError(NOTHING)
    stack = stack_of(anatomy, [*drops, *(keep.unit for keep in keeps)])
    stepper = Stepper(model, stack, list(batches_of(source, model)))
    tuning = _Tuning(model, anatomy, stepper, drops, keeps)
    tuning.through(places(stack), progress)
    tensors = whole(model, anatomy, keeps, tuning.tensors)
    healing = Healing(tensors, tuple(tuning.refits), tuning.left_alone, tuning.tokens, tuning.work)
    return judged(model, anatomy, stepper, tuning.held, Plan.of(drops, keeps=keeps), healing)


@dataclass(frozen=True)
class _Narrowed:
    """A write of a sublayer that gets narrower: the unit that each of its inputs belongs to, and the units kept."""

    write: Write
    units: Tensor
    kept: Tensor

    @property
    def weight(self) -> Tensor:
        """[outputs, inputs], whichever way it is stored."""
        weight: Tensor = self.write.linear.get_parameter("weight").detach()
        return weight.T if self.write.transposed else weight

    def with_scales(self, scales: Tensor) -> Tensor:
        new = scaled(self.weight, self.units, self.kept, scales.float())
        return new.T.contiguous() if self.write.transposed else new


class _Tuning:
    def __init__(
        self, model: nn.Module, anatomy: Anatomy, stepper: Stepper, drops: frozenset[Address], keeps: Iterable[Keep]
    ) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.refits: list[Refit] = []
        self.left_alone: dict[str, str] = {}
        self.held: list[Tensor] = []
        self.tokens = self.work = 0
        self._model, self._anatomy, self._stepper, self._drops = model, anatomy, stepper, drops
        self._keeps = {keep.unit: keep for keep in keeps}
        self._counted: set[tuple[str, int]] = set()

    def through(self, order: list[Place], progress: Progress | None) -> None:
        streams = [self._stepper.enter(i) for i in range(len(self._stepper.batches))]
        self.held = held_back([len(stream) for stream in streams])
        self.tokens = sum(stream.shape[0] * stream.shape[1] for stream in streams)
        for number, place in enumerate(order):
            narrower = [self._keeps[s.address] for s in place.kept(self._drops) if s.address in self._keeps]
            after = self._tuned(place, narrower, streams) if narrower else self._run(place, streams)
            streams = after if place.acts(self._drops) else streams  # what is gone runs for what it hands on besides
            if progress is not None:
                progress("scales", number + 1, len(order))

    def _run(self, place: Place, streams: list[Tensor]) -> list[Tensor]:
        self._count("cut", place)
        silent = place.silent(self._drops)
        return [self._stepper.run(i, place, stream, silent) for i, stream in enumerate(streams)]

    def _tuned(self, place: Place, narrower: list[Keep], streams: list[Tensor]) -> list[Tensor]:
        """The stream, one place on, as narrow as it will be and with scales where they help."""
        parts = [part for keep in narrower for part in self._parts(place, keep)]
        new = {part.write.weight: part.with_scales(scales) for part, scales in self._scales(place, parts, streams)}
        self.tensors |= new
        undo = Undo()
        try:
            narrow(self._model, self._anatomy, narrower, undo.set)
            for name, tensor in new.items():
                put(self._model, name, tensor, undo)
            return self._run(place, streams)
        finally:
            undo.restore()

    def _parts(self, place: Place, keep: Keep) -> list[_Narrowed]:
        sublayer = next(s for s in place.block.sublayers if s.address == keep.unit)
        writes, left = writes_of(self._model, sublayer, False)
        self.left_alone |= left
        inner, kept = inner_of(self._anatomy, keep), torch.tensor(keep.indices)
        return [_Narrowed(write, _units(inner, write.weight), kept) for write in writes]

    def _scales(
        self, place: Place, parts: list[_Narrowed], streams: list[Tensor]
    ) -> Iterator[tuple[_Narrowed, Tensor]]:
        """For each write the scales with which it misses least on what is held back; left out where old weights do."""
        self._count("whole", place)
        grams = [[torch.zeros(()), torch.zeros(())] for _ in parts]
        tokens = 0
        for i, stream in enumerate(streams):
            given: list[list[Tensor]] = [[] for _ in parts]
            hooks = [(p.write.linear, partial(keep_input, seen)) for p, seen in zip(parts, given, strict=True)]
            after = self._stepper.run(i, place, stream, place.silent(self._drops), hooks)
            real = self._stepper.real(i, after)
            back = self.held[i].to(real.device)[:, None]
            tokens += int((real & back).sum())
            for sums, seen in zip(grams, given, strict=True):
                for number, chosen in enumerate((real & ~back, real & back)):
                    energy = after[chosen].float().square().sum(-1, keepdim=True).clamp(min=_SMALLEST)
                    h = seen[0].reshape(*real.shape, -1)[chosen].float() / energy.sqrt()
                    sums[number] = sums[number].to(h.device) + h.T @ h
        for part, (fit, held) in zip(parts, grams, strict=True):
            scales = self._solved(part, in_common(fit, part.weight, part.units), held, max(tokens, 1))
            if scales is not None:
                yield part, scales

    def _solved(self, part: _Narrowed, table: Tensor, held_gram: Tensor, tokens: int) -> Tensor | None:
        held = in_common(held_gram, part.weight, part.units)
        before = missed(held, part.kept, torch.ones(len(part.kept), dtype=held.dtype, device=held.device))
        best, found, chosen = before, None, None
        for penalty in PENALTIES:
            scales = solved(table, part.kept, penalty)
            error = missed(held, part.kept, scales)
            if error < best:
                best, found, chosen = error, scales, penalty
            elif found is not None:
                break
        weight = part.write.weight
        self.refits.append(Refit(weight=weight, before=before / tokens, after=best / tokens, penalty=chosen))
        return found

    def _count(self, run: str, place: Place) -> None:
        """A block counts once for each kind of run, whatever parts it is run in."""
        if (run, place.number) not in self._counted:
            self._counted.add((run, place.number))
            self.work += self.tokens


def _units(inner: Inner, weight: str) -> Tensor:
    """The number of the unit that each input of a write belongs to."""
    pieces = [piece for piece in inner.slices if piece.parameter == weight]
    of = torch.empty(sum(inner.count * piece.width for piece in pieces), dtype=torch.long)
    for piece in pieces:
        numbers = torch.arange(inner.count).repeat_interleave(piece.width)
        of[piece.start : piece.start + len(numbers)] = numbers
    return of
