"""The execution table: which parts of a model run, in which order, and what stands in for those that do not.

Removal, run-time skipping, looping and reuse between steps are all such tables. A table is pure data; a constant one
is carried out by surgery (blocks that are visited again share their weights), any other is run by the run time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from billhook.plan.address import Address
from billhook.plan.errors import InputError

Verb = Literal["run", "skip", "repeat", "reuse"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _address(value: object) -> Address:
    return value if isinstance(value, Address) else Address.parse(str(value))


class Site(_Record):
    """One line of a table: a block or sublayer, and what becomes of it.

    ``run``: here, once. ``repeat``: here, ``times`` times in a row, each visit with cache slots of its own. ``skip``:
    it writes nothing to the stream. ``reuse``: it is not computed; what it handed on at the previous token is used
    again.
    """

    unit: Annotated[Address, BeforeValidator(_address), PlainSerializer(str, return_type=str)]
    verb: Verb
    times: Annotated[int, Field(ge=1, le=16)] = 1

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.verb != "skip" and self.unit.sublayer is not None:
            raise InputError(
                f"{self.verb} {self.unit}: only whole blocks run, repeat or are reused; a sublayer is skipped"
            )
        if self.verb == "repeat" and self.times < 2:
            raise InputError(f"repeat {self.unit}: times must be 2 or more")
        if self.verb != "repeat" and self.times != 1:
            raise InputError(f"{self.verb} {self.unit}: times is for repeat only")
        return self


class Schedule(_Record):
    """One table for every decode step (constant), or several that take turns: step t uses table t mod their number.

    A stack in which some block is listed with ``run`` or ``repeat`` runs exactly the visits listed, in that order. In
    every other stack all blocks run in their own order, but for those listed with ``skip`` or ``reuse``. The empty
    schedule changes nothing.

    Keys and values: under a constant table a skipped attention has no entry in the cache for any token, and every
    visit of a repeated block has its own. In turns, an attention that is left out at one step still puts the keys and
    values of its token into the cache, projected from the stream, since it may be asked for them at the next.
    """

    tables: Annotated[tuple[tuple[Site, ...], ...], Field(min_length=1)] = ((),)

    @model_validator(mode="after")
    def _sound(self) -> Self:
        for table in self.tables:
            self._check(table)
        return self

    def _check(self, table: Sequence[Site]) -> None:
        left_out = [site.unit for site in table if site.verb in ("skip", "reuse")]
        visited = {site.unit for site in table if site.verb in ("run", "repeat")}
        for unit in left_out:
            if left_out.count(unit) > 1:
                raise InputError(f"{unit} is left out twice in one table")
            if unit in visited:
                raise InputError(f"{unit} both runs and is left out in one table")
        if not self.constant and visited:
            raise InputError("tables that take turns can only skip and reuse: an order must be the same at every step")
        if self.constant and any(site.verb == "reuse" for site in table):
            raise InputError("reuse needs a step at which the block runs: give more than one table")

    @classmethod
    def skipping(cls, units: Iterable[Address | str]) -> Self:
        """The constant schedule that leaves these units out, in order of address."""
        addresses = {_address(unit) for unit in units}
        return cls(tables=(tuple(Site(unit=a, verb="skip") for a in sorted(addresses)),))

    @classmethod
    def chain(cls, blocks: Sequence[int], stack: str = "decoder") -> Self:
        """The constant schedule that visits these blocks of one stack in this order: a chain of layers."""
        sites: list[Site] = []
        for block in blocks:
            unit = Address(stack, block)
            times = 1
            if sites and sites[-1].unit == unit:
                times = sites.pop().times + 1
            sites.append(Site(unit=unit, verb="run" if times == 1 else "repeat", times=times))
        return cls(tables=(tuple(sites),))

    @property
    def constant(self) -> bool:
        return len(self.tables) == 1

    def skips(self, step: int = 0) -> frozenset[Address]:
        """What is skipped outright at a decode step, as it is listed."""
        return frozenset(site.unit for site in self._at(step) if site.verb == "skip")

    def reuses(self, step: int = 0) -> frozenset[Address]:
        """The blocks whose last output is used again at a decode step."""
        return frozenset(site.unit for site in self._at(step) if site.verb == "reuse")

    def order(self, stack: str, blocks: int) -> list[int]:
        """The visits of a stack of so many blocks under a constant schedule, as block numbers."""
        table = [site for site in self._at(0) if site.unit.stack == stack and site.unit.sublayer is None]
        visits = [site.unit.block for site in table if site.verb in ("run", "repeat") for _ in range(site.times)]
        if visits:
            return visits
        gone = {site.unit.block for site in table}
        return [i for i in range(blocks) if i not in gone]

    def _at(self, step: int) -> tuple[Site, ...]:
        return self.tables[step % len(self.tables)]
