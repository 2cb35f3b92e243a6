"""The dense stream and the healed one, walking through a stack side by side, one place at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as multiply

from billhook.anatomy.bridge import BRIDGE
from billhook.anatomy.types import Anatomy, Sublayer
from billhook.anatomy.undo import Undo
from billhook.heal.healing import put
from billhook.heal.refit.bridge import fitted
from billhook.heal.refit.graft import choose, donors
from billhook.heal.refit.low_rank import onto, projected
from billhook.heal.refit.norms import Norm, norm_behind
from billhook.heal.refit.on_disk import on_disk
from billhook.heal.refit.peers import Peers
from billhook.heal.refit.places import Place
from billhook.heal.refit.pool import Pool
from billhook.heal.refit.reads import folded, reads_of, same_inputs
from billhook.heal.refit.regressions import Regressions
from billhook.heal.refit.ridge import PENALTIES
from billhook.heal.refit.stepping import Stepper
from billhook.heal.refit.watch import Seen, keep_input, watching
from billhook.heal.refit.writes import NOT_ADDED, Write, scale_of, writes_of
from billhook.measure.patch import Forward
from billhook.plan.address import Address
from billhook.plan.plan import Keep
from billhook.plan.record import Graft, Refit
from billhook.surgery.factorise import Factor
from billhook.surgery.narrow import narrow

Progress = Callable[[str, int, int], None]


class Walk:
    """What has been found so far, see ``Healing``; tensors of sublayers that get narrower have the shapes that are left
    of them. The model is changed within calls; no place runs once healed."""

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        stepper: Stepper,
        drops: frozenset[Address],
        keeps: Iterable[Keep],
        peers: Peers,
        factors: Iterable[Factor] = (),
        gaps: Set[Place] = frozenset(),
    ) -> None:
        """``gaps``: the places behind which a bridge is to stand."""
        self.tensors: dict[str, Tensor] = {}
        self.grafts: list[Graft] = []
        self.left_alone: dict[str, str] = {}
        self.tokens = self.work = 0
        self._model, self._anatomy, self._stepper, self._drops = model, anatomy, stepper, drops
        self._peers, self._gaps = peers, gaps
        self._dense_model, self._dense_stepper = model, stepper
        self._kept: Tensor | slice = slice(None)  # the channels of the dense stream that the cut one has
        self._keeps = {keep.unit: keep for keep in keeps}
        self._factors = {f"{factor.path}.weight": factor for factor in factors}
        self.held: list[Tensor] = []
        self._counted: set[tuple[str, int]] = set()
        self._donors: dict[Address, list[Sublayer]] = {}
        self._donated: Seen = {}
        self._reach: dict[str, Tensor | None] = {}

    @property
    def refits(self) -> list[Refit]:
        return self._regressions.refits

    def through(self, places: list[Place], progress: Progress | None) -> None:
        """From the first block to the last. A place that stays waits until the dense stream is where the next one reads
        it; as long as nothing is missing, the streams are one and the same."""
        dense = [self._dense_stepper.enter(i) for i in range(len(self._dense_stepper.batches))]
        self.held = self._peers.held_back([len(stream) for stream in dense])
        self._regressions = Regressions(self._stepper, self.held, self._peers)
        self.tokens = int(*self._peers.added(sum(stream.shape[0] * stream.shape[1] for stream in dense)))
        waiting, gap = None, self._model is not self._dense_model
        cut = [self._stepper.enter(i) for i in range(len(dense))] if gap else dense
        seen: Seen = {}
        found = {} if gap else donors(self._model, places, self._drops)
        apart = {factor.edit.unit for factor in self._factors.values()}
        self._donors = {mlp: of_it for mlp, of_it in found.items() if mlp not in self._keeps and mlp not in apart}
        giving = {donor.address: donor for of_it in self._donors.values() for donor in of_it}
        for index, place in enumerate(places):
            if place.acts(self._drops):
                if waiting is not None:
                    cut = self._heal(waiting, cut, self._left(dense), seen) if gap else dense
                waiting, seen = place, self._watched(place) if gap else {}
            gap = (
                gap
                or len(place.kept(self._drops)) < len(place.sublayers)
                or bool(self._narrower(place) or self._apart(place))
            )
            lent = self._room([giving[s.address] for s in place.sublayers if s.address in giving])
            watched = (seen if place is waiting else {}) | lent
            dense = self._ahead(place, dense, watched)
            self._donated |= lent
            if progress is not None:
                progress("healing", index + 1, len(places))
        if waiting is not None and gap:
            self._heal(waiting, cut, self._left(dense), seen)

    def _left(self, dense: list[Tensor]) -> list[Tensor]:
        return [stream[..., self._kept] for stream in dense]

    def _narrower(self, place: Place) -> list[Keep]:
        return [self._keeps[s.address] for s in place.sublayers if s.address in self._keeps]

    def _apart(self, place: Place) -> list[Factor]:
        units = {s.address for s in place.kept(self._drops)}
        return [factor for factor in self._factors.values() if factor.edit.unit in units]

    def _watched(self, place: Place) -> Seen:
        """The sublayers of a place whose reads can be refitted, with room for what their linears are given."""
        return {} if place.mixed else self._room(place.kept(self._drops))

    def _room(self, sublayers: Iterable[Sublayer]) -> Seen:
        groups = {s: reads_of(self._dense_model, s) for s in sublayers}
        return {s.address: (reads, {name: [] for name in reads}) for s, reads in groups.items() if reads}

    def _ahead(self, place: Place, streams: list[Tensor], seen: Seen) -> list[Tensor]:
        """The dense stream, one place on; what the reads are given is added to ``seen``."""
        self._count("dense", place)
        silent, hooks = place.silent(frozenset()), watching(seen)
        return [self._dense_stepper.run(i, place, stream, silent, hooks) for i, stream in enumerate(streams)]

    def _heal(self, place: Place, cut: list[Tensor], target: list[Tensor], seen: Seen) -> list[Tensor]:
        """The cut stream, one place on, with reads and writes of the place refitted, as narrow as they will be."""
        self._count("cut", place)
        undo = Undo()
        try:
            narrow(self._model, self._anatomy, self._narrower(place), undo.set)
            for name, tensor in projected(self._model, self._apart(place)).items():
                put(self._model, name, tensor, undo)
            self._take(self._reads(place, cut, seen), undo)
            for mlp in place.kept(self._drops):
                self._grafts(place, mlp, cut, target, undo)
            wanted = {donor.address for of_it in self._donors.values() for donor in of_it}
            self._donated = {address: given for address, given in self._donated.items() if address in wanted}
            return self._across(place, self._writes(place, cut, target), target)
        finally:
            undo.restore()

    def _take(self, new: dict[str, Tensor], undo: Undo) -> None:
        self.tensors |= {name: on_disk(tensor) for name, tensor in new.items()}
        for name, tensor in new.items():
            put(self._model, name, tensor, undo)

    def _reads(self, place: Place, cut: list[Tensor], seen: Seen) -> dict[str, Tensor]:
        """New reads: what the dense sublayer was given is guessed from what this one is given."""
        here = {part.address: reads_of(self._model, part) for part in place.sublayers if part.address in seen}
        now: Seen = {address: (reads, {name: [] for name in reads}) for address, reads in here.items()}
        if now:
            self._count("reads", place)
            silent = place.silent(self._drops)
            linears = {name: linear for reads, _ in now.values() for name, linear in reads.items()}
            into = {name: inputs for _, given in now.values() for name, inputs in given.items()}
            for i, stream in enumerate(cut):
                for name, inputs in self._stepper.given(i, place, stream, silent, linears).items():
                    into[name].append(inputs)
        new: dict[str, Tensor] = {}
        for address, (reads, given) in now.items():
            x, goal = same_inputs(given), same_inputs(seen[address][1])
            if x is None or goal is None:
                continue
            x, goal = ([t.reshape(*s.shape[:2], -1) for t, s in zip(ts, cut, strict=True)] for ts in (x, goal))
            lacks = [there.to(torch.float32, copy=True) for there in goal]
            for lack, read in zip(lacks, x, strict=True):
                lack[..., self._kept] -= read.float()
            solution = self._regressions.solve(list(reads), x, lacks, goal)
            if solution is not None:
                new |= folded(reads, solution.change, self._whole(reads))
        return new

    def _whole(self, reads: dict[str, nn.Module]) -> dict[str, Tensor]:
        """The weights of reads over all channels of the dense stream, where the cut one has fewer."""
        return {}

    def _grafts(self, place: Place, mlp: Sublayer, cut: list[Tensor], target: list[Tensor], undo: Undo) -> None:
        """One donor after the other offers its neurons; on record is what is left of each in the end."""
        donors, origin = self._donors.pop(mlp.address, []), torch.zeros(0)
        for number, donor in enumerate(donors, 1):
            neurons, new = self._graft(place, mlp, donor, cut, target)
            if neurons is None:
                continue
            self._take(new, undo)
            own = origin if len(origin) else torch.zeros(len(neurons))
            origin = torch.cat([own, torch.full_like(own, number)])[neurons.cpu()]
        for number, donor in enumerate(donors, 1):
            if taken := int((origin == number).sum()):
                self.grafts.append(Graft(into=str(mlp.address), source=str(donor.address), neurons=taken))

    def _graft(
        self, place: Place, mlp: Sublayer, donor: Sublayer, cut: list[Tensor], target: list[Tensor]
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Which neurons of an MLP and a donor, one behind the other, it has from now on, and its parameters with them,
        its write still to be fitted; none without gain."""
        theirs, given = self._donated[donor.address]
        found = {write.weight: (write, scale) for write, scale in self._scales(place, cut[0])}
        if mlp.writes[0] not in found:
            return None, {}
        write, scale = found[mlp.writes[0]]
        reads, goal = reads_of(self._model, mlp), same_inputs(given)
        x, own, after = self._values(place, reads, write, cut)
        if not x or not goal:
            return None, {}
        x, goal = ([t.reshape(s.shape) for t, s in zip(ts, cut, strict=True)] for ts in (x, goal))
        sums = self._regressions.moments(x, [z.float() - y.float() for y, z in zip(x, goal, strict=True)], goal)
        guess = self._peers.solved(*sums, PENALTIES[0])
        changed = {} if guess is None else folded(theirs, guess.change)
        source = self._model.get_submodule(donor.writes[0].removesuffix(".weight"))
        pool, n = Pool.of(reads, theirs, changed, write, source), own[0].shape[-1]
        undo = Undo()
        try:
            for name, tensor in pool.chosen(torch.arange(n, 2 * n)).items():
                put(self._model, name, tensor, undo)
            silent, wanted = place.silent(self._drops), {write.weight: write.linear}
            other = [self._stepper.given(i, place, s, silent, wanted)[write.weight] for i, s in enumerate(cut)]
        finally:
            undo.restore()
        h = [torch.cat(pair, -1) for pair in zip(own, other, strict=True)]
        old = pool.columns[:n].float() * scale
        lacks = _lacks(after, target)
        lacks = [r + (mine.float() @ old).reshape(r.shape) for r, mine in zip(lacks, own, strict=True)]
        fit, held = self._regressions.moments([write.inputs(values) for values in h], lacks, target)
        neurons = self._peers.first(lambda: choose(fit, held, pool.columns.float() * scale, n))
        if neurons is None:
            return None, {}
        return neurons, pool.chosen(neurons) | pool.writing(neurons, write)

    def _values(
        self, place: Place, reads: dict[str, nn.Module], write: Write, cut: list[Tensor]
    ) -> tuple[list[Tensor] | None, list[Tensor], list[Tensor]]:
        """What reads are given (None unless all the same), what the write is given, and the stream after the place."""
        given: dict[str, list[Tensor]] = {name: [] for name in reads}
        inputs: list[Tensor] = []
        hooks = [(linear, partial(keep_input, given[name])) for name, linear in reads.items()]
        hooks.append((write.linear, partial(keep_input, inputs)))
        after = [self._stepper.run(i, place, stream, place.silent(self._drops), hooks) for i, stream in enumerate(cut)]
        return same_inputs(given), inputs, after

    def _writes(self, place: Place, cut: list[Tensor], target: list[Tensor]) -> list[Tensor]:
        writes = self._scales(place, cut[0])
        scales: list[tuple[Write | Norm, Tensor]] = [*writes, *self._norms(place, cut[0], writes)]
        inputs: dict[str, list[Tensor]] = {write.weight: [] for write, _ in scales}
        hooks = [write.watch(inputs[write.weight]) for write, _ in scales]
        silent = place.silent(self._drops)
        after = [self._stepper.run(i, place, stream, silent, hooks) for i, stream in enumerate(cut)]
        for write, scale in scales:
            after = self._refit(write, scale, inputs.pop(write.weight), after, target)
        return after

    def _across(self, place: Place, after: list[Tensor], target: list[Tensor]) -> list[Tensor]:
        """The stream behind a place, on the far side of its bridge where it has one."""
        if place not in self._gaps:
            return after
        first, second = (f"{place.block.path}.{BRIDGE}.{part}.weight" for part in ("reduce", "expand"))
        found, refit = fitted(first, *self._regressions.moments(after, _lacks(after, target), target), self._peers)
        self._regressions.refits.append(refit)
        if found is None:
            return after
        a, b = (factor.to(after[0].dtype).contiguous() for factor in found)
        self.tensors |= {first: on_disk(a), second: on_disk(b)}
        return [now + multiply(multiply(now, a), b) for now in after]

    def _scales(self, place: Place, stream: Tensor) -> list[tuple[Write, Tensor]]:
        """The writes of a place that can be refitted, with what they are multiplied with on the way to the stream."""
        found = []
        for sublayer in place.kept(self._drops):
            writes, left = writes_of(self._model, sublayer, place.mixed)
            self.left_alone |= left
            for write in writes:
                scale = self._scale(place, stream, write.weight, write.linear)
                if scale is None:
                    self.left_alone[write.weight] = NOT_ADDED
                else:
                    found.append((write, scale))
        return found

    def _norms(self, place: Place, stream: Tensor, writes: list[tuple[Write, Tensor]]) -> list[tuple[Norm, Tensor]]:
        """The norms that are refitted in the place of writes behind which they stand, as ``_scales``. None where
        linears are taken apart: what those write lacks direction, and least squares would only shrink it."""
        refitted = {write.weight for write, _ in writes}
        found = []
        for sublayer in () if place.mixed or self._apart(place) else place.kept(self._drops):
            norm = norm_behind(self._model, sublayer) if refitted.isdisjoint(sublayer.writes) else None
            scale = None if norm is None else self._scale(place, stream, norm.weight, norm.module)
            if norm is not None and scale is not None:
                found.append((norm, scale))
        return found

    def _scale(self, place: Place, stream: Tensor, name: str, module: nn.Module) -> Tensor | None:
        """What a module of this name puts out is multiplied with so; asked once, since no weights change it."""

        def run(hook: Forward | None) -> Tensor:
            hooks = [] if hook is None else [(module, hook)]
            return self._stepper.run(0, place, stream, place.silent(self._drops), hooks)

        if name not in self._reach:
            self._reach[name] = self._peers.first(partial(scale_of, run))
        return self._reach[name]

    def _refit(
        self, write: Write | Norm, scale: Tensor, inputs: list[Tensor], after: list[Tensor], target: list[Tensor]
    ) -> list[Tensor]:
        """Refit one write; the stream with what it writes now."""
        lacks = _lacks(after, target)
        factor = self._factors.get(write.weight)
        within = None if factor is None else partial(onto, factor.basis, scale)
        solution = self._regressions.solve(
            [write.weight], [write.inputs(h) for h in inputs], lacks, target, within, write.sums
        )
        if solution is None:
            return after
        new = write.changed(solution.change / scale)
        self.tensors |= {name: on_disk(tensor) for name, tensor in new.items()}
        more = (write.written(h, new).reshape(now.shape) for h, now in zip(inputs, after, strict=True))
        return [(now.float() + scale * step).to(now.dtype) for now, step in zip(after, more, strict=True)]

    def _count(self, side: str, place: Place) -> None:
        if (side, place.number) not in self._counted:
            self._counted.add((side, place.number))
            self.work += self.tokens


def _lacks(now: list[Tensor], goal: list[Tensor]) -> list[Tensor]:
    return [end.float() - stream.float() for stream, end in zip(now, goal, strict=True)]
