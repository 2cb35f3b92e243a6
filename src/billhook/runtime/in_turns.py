"""A schedule whose tables take turns from one generated token to the next."""

from __future__ import annotations

from collections.abc import Callable
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


class Scheduled(Policy):
    """Runs a ``schedule``: constant, or tables that take turns from one generated token to the next (the first
    generated token that is read back is step 0). What is read several tokens at a time, as prompts are, always runs
    whole there.

    A block with ``reuse`` is not computed. With ``reuse`` "update" it writes to the stream what it wrote at the token
    before, y[t] = x[t] + (y[t-1] - x[t-1]); with "state" it hands on what it handed on then, y[t] = y[t-1].

    Keys and values: under a constant schedule what is left out has no entry for any token; in turns they are projected
    from the stream as it comes into the block. State: the stream before and after each reused block at the last token.
    Where there is none that fits (another cache, a shorter one, another batch) the block runs. Beam search moves rows
    about without telling, so tables with ``reuse`` refuse it.
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
    *,
    entries: bool = True,
) -> Attached:
    """The model under tables that take turns. ``corrections`` maps a reused block to a function of x[t] - x[t-1]
    [batch, 1, hidden] whose value is added to what is reused. Without ``entries`` a reused block makes no keys and
    values (see ``Gaps``, also for what is refused then)."""
    check_schedule(schedule, anatomy.outline)
    counts = Counts()
    stacks = {site.unit.stack for table in schedule.tables for site in table}
    reused = {site.unit for table in schedule.tables for site in table if site.verb == "reuse"}
    gaps = None if entries else Gaps(model, anatomy, reused)
    online = Online(model, anatomy, _Turns(schedule, reuse, corrections, gaps), stacks, counts)

    def fit(undo: Undo) -> None:
        if gaps is not None:
            gaps.fit(undo)  # before what may take an attention's forward away for a pass
        online.fit(undo)

    return Attached(model, policy, counts, fit, beams=not reused)


class _Turns:
    def __init__(
        self, schedule: Schedule, reuse: Reuse, corrections: dict[Address, Correction], gaps: Gaps | None
    ) -> None:
        self._schedule, self._reuse, self._corrections, self._gaps = schedule, reuse, corrections, gaps
        self._reused = {site.unit for table in schedule.tables for site in table if site.verb == "reuse"}
        self._last: dict[Address, tuple[Tensor, Tensor]] = {}
        self._began = self._end = 0

    def begin(self, now: Pass) -> None:
        if now.prompt:
            self._began = now.past + now.tokens
        goes_on = now.past == self._end and now.past > 0
        if not goes_on:
            self._last.clear()
        if self._gaps is not None:
            self._gaps.begin(now, goes_on=goes_on)
        self._end = now.past + now.tokens

    def decide(self, block: Block, stream: Tensor, now: Pass) -> Skip | None:
        if now.prompt:
            return None
        step = now.past - self._began
        everything = frozenset(sub.kind for sub in block.sublayers)
        if block.address in self._schedule.reuses(step):
            last = self._last.get(block.address)
            if last is None or last[0].shape[0] != now.rows:
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
            self._last[block.address] = (before[:, -1:], after[:, -1:])

    def saw_mlp(self, block: Block, before: Tensor, after: Tensor, now: Pass) -> None:
        pass
