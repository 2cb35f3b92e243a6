"""A schedule whose tables take turns from one generated token to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy, Block
from billhook.anatomy.undo import Undo
from billhook.plan.address import Address
from billhook.plan.check_schedule import check_schedule
from billhook.plan.schedule import Schedule
from billhook.runtime.attached import Attached
from billhook.runtime.constant import attach_schedule
from billhook.runtime.counts import Counts
from billhook.runtime.gaps import Gaps
from billhook.runtime.online import Online, Pass, Skip
from billhook.runtime.policy import Policy

Reuse = Literal["update", "state"]
Correction = Callable[[Tensor], Tensor]
_MARK = "_billhook_turns"


class Scheduled(Policy):
    """Runs a ``schedule``: constant, or tables that take turns from one generated token to the next (the first
    generated token that is read back is step 0). What is read several tokens at a time, as prompts are, always runs
    whole there.

    A block with ``reuse`` is not computed. With ``reuse`` "update" it writes to the stream what it wrote at the token
    before, y[t] = x[t] + (y[t-1] - x[t-1]); with "state" it hands on what it handed on then, y[t] = y[t-1].

    Keys and values: under a constant schedule what is left out has no entry for any token; in turns they are projected
    from the stream as it comes into the block. State: the stream before and after each reused block at the last token,
    kept with the cache. Where there is none that fits (a cache filled otherwise, cut back, another batch) the block
    runs. Beam search moves rows about without telling, so tables with ``reuse`` refuse it.
    """

    name: ClassVar[str] = "scheduled"
    paper: ClassVar[str] = ""
    kv: ClassVar[str] = "constant: no entry for any token; in turns: projected from the stream"

    schedule: Schedule = Schedule()
    reuse: Reuse = "update"

    def _attach(self, model: PreTrainedModel, anatomy: Anatomy) -> Attached:
        if self.schedule.constant:
            return attach_schedule(model, anatomy, self.schedule, self)
        return attach_turns(model, anatomy, self.schedule, self, self.reuse, {})


def attach_turns(
    model: PreTrainedModel,
    anatomy: Anatomy,
    schedule: Schedule,
    policy: Policy,
    reuse: Reuse,
    corrections: dict[Address, Correction],
    gaps: Gaps | None = None,
) -> Attached:
    """The model under tables that take turns. ``corrections`` maps a reused block to a function of x[t] - x[t-1]
    [batch, 1, hidden] whose value is added to what is reused. With ``gaps`` of the reused blocks these make no keys
    and values."""
    check_schedule(schedule, anatomy.outline)
    counts = Counts()
    stacks = {site.unit.stack for table in schedule.tables for site in table}
    reusing = any(site.verb == "reuse" for table in schedule.tables for site in table)
    online = Online(model, anatomy, _Turns(schedule, reuse, corrections, gaps), stacks, counts)

    def fit(undo: Undo) -> None:
        if gaps is not None:
            gaps.fit(undo)  # before what may take an attention's forward away for a pass
        online.fit(undo)

    return Attached(model, policy, counts, fit, beams=not reusing)


@dataclass
class _State:
    """What is known of a sequence, kept with its cache: its length when generation ``began``, and at the ``end`` so
    far; of each reused block the length at its ``last`` token, and the streams before and after it there; the positions
    ``gone`` from its cache."""

    began: int
    end: int = 0
    last: dict[Address, tuple[int, Tensor, Tensor]] = field(default_factory=dict)
    gone: dict[int, list[int]] = field(default_factory=dict)


class _Turns:
    def __init__(
        self, schedule: Schedule, reuse: Reuse, corrections: dict[Address, Correction], gaps: Gaps | None
    ) -> None:
        self._schedule, self._reuse, self._corrections, self._gaps = schedule, reuse, corrections, gaps
        self._reused = {site.unit for table in schedule.tables for site in table if site.verb == "reuse"}
        self._state = _State(began=0)

    def begin(self, now: Pass) -> None:
        known = vars(now.cache).get(_MARK) if now.cache is not None and now.past else None
        self._state = known or _State(began=now.past, end=now.past)
        if now.cache is not None:
            vars(now.cache)[_MARK] = self._state
        if now.prompt:
            self._state.began = now.past + now.tokens
        if self._gaps is not None:
            self._gaps.begin(now, self._state.gone, whole=self._state.end == now.past)
        self._state.end = now.past + now.tokens

    def decide(self, block: Block, stream: Tensor, now: Pass) -> Skip | None:
        if now.prompt:
            return None
        step = now.past - self._state.began
        everything = frozenset(sub.kind for sub in block.sublayers)
        if block.address in self._schedule.reuses(step):
            length, *last = self._state.last.get(block.address, (-1, stream, stream))
            if length != now.past or last[0].shape[0] != now.rows:
                return None
            if self._gaps is not None:
                self._gaps.leave(block.address)
            return Skip(everything, instead=self._again(block.address, stream, *last), entries=self._gaps is None)
        skips = self._schedule.skips(step)
        if block.address in skips:
            return Skip(everything)
        kinds = frozenset(sub.kind for sub in block.sublayers if sub.address in skips)
        return Skip(kinds) if kinds else None

    def _again(self, block: Address, stream: Tensor, before: Tensor, after: Tensor) -> Tensor:
        again = after if self._reuse == "state" else stream + (after - before)
        correction = self._corrections.get(block)
        return again if correction is None else again + correction(stream - before)

    def saw(self, block: Block, before: Tensor, after: Tensor, now: Pass) -> None:
        if block.address in self._reused:
            # of a prompt a copy, which does not hold the rest of it
            before, after = (x[:, -1:].clone() if now.tokens > 1 else x for x in (before, after))
            self._state.last[block.address] = (now.past + now.tokens, before, after)

    def saw_mlp(self, block: Block, before: Tensor, after: Tensor, now: Pass) -> None:
        pass
