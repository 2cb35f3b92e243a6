"""The forward pass over fixed inputs, restarted from the middle: what stays the same is not computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy.bridge import require_no_bridges
from billhook.anatomy.types import Anatomy, Stack
from billhook.data import Windows
from billhook.measure.batches import Batch, batches_of, for_the_head, real_tokens
from billhook.measure.patch import (
    Forward,
    Reached,
    Tail,
    hand_on,
    hooked,
    lending,
    observing,
    overridden,
    put_in,
    silencers,
    stream_in,
    stream_out,
    tail_of,
)
from billhook.plan.address import Address
from billhook.plan.check import normalise
from billhook.plan.errors import InputError

Progress = Callable[[str, int, int], None]


@dataclass
class _Suffix:
    """The stream of every batch at block inputs ``start`` to n (n: after the last block), under ``drops``."""

    drops: frozenset[Address]
    start: int
    streams: list[list[Tensor]]


class Replay:
    """One stack of a model over fixed inputs, in a *state*: the set of its units that are dropped so far.

    The stream at the input of every block is kept for the current state, so a further drop in block b costs only the
    blocks after b. The model runs its own forward, blocks in place; those before the restart hand on what they get
    (so masks, positions and per-layer arguments stay the model's business), the last of them the stored stream, with
    whatever else it returned in the dense pass. Blocks before the restart whose keys and values later ones read run
    again for these. The model is changed within calls only.

    ``work`` counts block-token forwards, exactly: blocks executed x tokens, the dense pass included. A block with a
    silenced sublayer counts 1, a dropped one 0; embeddings and head are not counted.

    Memory, on the model's device and in its dtype: (blocks + 1) x tokens x hidden for the state, and at most as much
    again for the streams of the last candidate, so that committing it costs nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        source: Windows | Iterable[Batch],
        stack: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Runs the dense model once over the inputs. ``stack`` is the decoder unless told, or the only stack there is.

        Raises InputError for a stack that is not there, and where the stream is not finite.
        """
        require_no_bridges(model)
        self.model = model
        self.anatomy = anatomy
        self.stack = _choose(anatomy, stack)
        self.state: frozenset[Address] = frozenset()
        self.work = 0
        self._blocks = [model.get_submodule(block.path) for block in self.stack.blocks]
        self._tails: list[list[Tail]] = []
        self._streams: list[list[Tensor]] = []
        self._last: _Suffix | None = None
        self.batches = list(batches_of(source, model))
        for index in range(len(self.batches)):
            self._streams.append(self._dense(index))
            if progress is not None:
                progress("dense pass", index + 1, len(self.batches))
        self._known = {block.address for block in self.stack.blocks}
        self._known |= {sub.address for block in self.stack.blocks for sub in block.sublayers}

    @property
    def final(self) -> list[Tensor]:
        """The stream after the last block in the current state: one tensor [rows, tokens, hidden] a batch."""
        return [streams[-1] for streams in self._streams]

    @property
    def real(self) -> list[Tensor]:
        """Which positions are no padding: one bool tensor [rows, tokens] a batch."""
        pairs = zip(self.batches, self._streams, strict=True)
        return [real_tokens(batch, self.stack.name, streams[-1]) for batch, streams in pairs]

    @property
    def tokens(self) -> int:
        """Positions in all batches, padding included: what a block forward over everything costs in ``work``."""
        return sum(streams[-1].shape[0] * streams[-1].shape[1] for streams in self._streams)

    def streams(self, batch: int) -> list[Tensor]:
        """The stream at the input of every block, and after the last one, in the current state: [rows, tokens, hidden]
        each."""
        return self._streams[batch]

    def onward(self, batch: int, start: int, stream: Tensor) -> list[Tensor]:
        """The stream after each block from ``start`` (1 at least) on, if it were this one at the input of that block;
        the state stays. Costs these blocks.
        """
        return self._run(batch, start, stream, self.state)

    def without(self, *units: Address) -> list[Tensor]:
        """The stream after the last block with these units dropped as well; the state stays.

        Costs the blocks after the first one affected (that one included, if only a sublayer of it goes).
        """
        return self.under(self.state | self._checked(units))

    def again(self, start: int) -> list[Tensor]:
        """The stream after the last block if something has changed in the weights of block ``start`` or after it; the
        state stays. Costs these blocks."""
        return [self._run(i, start, streams[start], self.state)[-1] for i, streams in enumerate(self._streams)]

    def under(self, drops: Iterable[Address]) -> list[Tensor]:
        """The stream after the last block with exactly these drops; the state stays.

        Costs the blocks from the first one on in which they differ from the state.
        """
        self._last = self._suffix(self._checked(drops))
        return [streams[-1] for streams in self._last.streams]

    def move(self, drops: Iterable[Address]) -> None:
        """Make exactly these drops the state, units dropped before and not among them coming back.

        Costs the blocks from the first one that differs on; nothing if ``without`` has just been there.
        """
        drops = normalise(self._checked(drops), self.anatomy.outline)
        suffix = self._last if self._last is not None and self._last.drops == drops else self._suffix(drops)
        for streams, new in zip(self._streams, suffix.streams, strict=True):
            streams[suffix.start :] = new
        self.state = drops
        self._last = None

    def logits(self, ids: Tensor, stream: Tensor) -> Tensor:
        """The model's output for a piece of the final stream of a language model: [c, hidden] -> [c, vocabulary].

        Final norm, head and whatever the model does to logits are its own: its forward runs over the ids [c] of these
        positions, every block hands on, the last one the piece.
        """
        with observing(self.model), overridden(self._stepping(0, len(self._blocks), stream[None])):
            return torch.as_tensor(self.model(**for_the_head(self.model, ids)).logits)[0]

    def _checked(self, units: Iterable[Address]) -> frozenset[Address]:
        units = frozenset(units)
        unknown = sorted(units - self._known)
        if unknown:
            raise InputError(f"unit {unknown[0]} is not in stack {self.stack.name}, which is the one replayed")
        return units

    def _suffix(self, drops: Iterable[Address]) -> _Suffix:
        drops = normalise(drops, self.anatomy.outline)
        first = min((a.block for a in drops ^ self.state), default=len(self._blocks))
        given = [streams[first] for streams in self._streams]
        start = first + 1 if Address(self.stack.name, first) in drops else first
        streams = [[stream, *self._run(i, start, stream, drops)] for i, stream in enumerate(given)]
        return _Suffix(drops, start, streams)

    def _run(self, batch: int, start: int, stream: Tensor, drops: frozenset[Address]) -> list[Tensor]:
        """The stream after each block from ``start`` on, given the stream at the input of that block."""
        if start == len(self._blocks):
            return []
        gone = [i for i in range(start, len(self._blocks)) if Address(self.stack.name, i) in drops]
        cut = [a for a in drops if a.sublayer is not None and a.block >= start]
        forwards = self._stepping(batch, start, stream)
        forwards += [(self._blocks[i], partial(hand_on, tail=self._tails[batch][i])) for i in gone]
        forwards += silencers(self.model, [self.anatomy.sublayer(a) for a in cut])
        outputs = self._watch(batch, start, forwards)
        lenders = sum(block.lends for block in self.stack.blocks[:start])
        self.work += (len(outputs) - len(gone) + lenders) * stream.shape[0] * stream.shape[1]
        return [stream_out(output) for output in outputs]

    def _stepping(self, batch: int, start: int, stream: Tensor) -> list[tuple[nn.Module, Forward]]:
        """Overrides that hand the embeddings on through the blocks before ``start`` and put ``stream`` at its input."""
        forwards: list[tuple[nn.Module, Forward]] = []
        for index, (block, tail) in enumerate(zip(self._blocks[:start], self._tails[batch][:start], strict=True)):
            last = index == start - 1
            answer = partial(put_in, stream=stream, tail=tail) if last else partial(hand_on, tail=tail)
            if self.stack.blocks[index].lends and start < len(self._blocks):
                given = self._streams[batch][index]
                answer = partial(lending, own=block.forward, stream=given, answer=answer)
            forwards.append((block, answer))
        return forwards

    def _dense(self, batch: int) -> list[Tensor]:
        inputs: list[Tensor] = []

        def enter(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs.append(stream_in(*args, **kwargs))

        with hooked([(self._blocks[0], enter)]):
            outputs = self._watch(batch, 0, [])
        self._tails.append([tail_of(output) for output in outputs])
        streams = [*inputs, *(stream_out(output) for output in outputs)]
        for index, stream in enumerate(streams):
            if not stream[real_tokens(self.batches[batch], self.stack.name, stream)].isfinite().all():
                place = f"into {self.stack.name}.0" if index == 0 else f"out of {self.stack.name}.{index - 1}"
                raise InputError(f"NaN or infinite values come {place}: the weights or the inputs are damaged")
        self.work += len(outputs) * streams[0].shape[0] * streams[0].shape[1]
        return streams

    def _watch(self, batch: int, start: int, forwards: list[tuple[nn.Module, Forward]]) -> list[Any]:
        """Run the model under overrides up to its last block; the outputs of the blocks from ``start`` on."""
        outputs: list[Any] = []

        def keep(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            outputs.append(output)
            if block is self._blocks[-1]:
                raise Reached

        watched: list[tuple[nn.Module, Forward]] = [(block, keep) for block in self._blocks[start:]]
        with observing(self.model), overridden(forwards), hooked(watched):
            try:
                self.model(**self.batches[batch])
            except Reached:
                return outputs
        raise InputError(f"the inputs never reach the last block of {self.stack.name}")


def _choose(anatomy: Anatomy, name: str | None) -> Stack:
    names = [stack.name for stack in anatomy.stacks]
    if name is None and len(names) > 1:
        causal = [stack.name for stack in anatomy.stacks if stack.causal]
        name = causal[0] if len(causal) == 1 else None
    elif name is None:
        name = names[0]
    if name not in names:
        raise InputError(f"a stack to replay must be named: this {anatomy.family} model has {', '.join(names)}")
    return anatomy.stack(name)
