"""Figures that were paid for are kept: in memory within a search, and on disk across a crash."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Generic

from billhook.plan.errors import InputError
from billhook.search.objective import C, Change, Objective

Key = tuple[str, ...]


def _key(drops: Iterable[Change]) -> Key:
    return tuple(str(unit) for unit in sorted(drops))


class Ledger:
    """An append-only file of finished evaluations, one JSON object a line: drops, value (exact), work it took.

    The first line, the header, says whose evaluations they are: fingerprints of model and calibration, the objective,
    whatever else a value depends on. Every line is on the disk before the search goes on. A last line that a crash
    tore is cut off; the evaluation is made again.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, object]) -> None:
        """Opens or begins the file. Raises InputError for the ledger of another search, or a damaged one."""
        self.path = Path(path)
        self.header = {"ledger": 1, **header}
        self.entries: dict[Key, tuple[float, int]] = {}
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            self._load(whole.splitlines())
            self._file = self.path.open("ab")
            self._file.truncate(len(whole))
        except OSError as error:
            raise InputError(f"search ledger {self.path} cannot be used: {error}") from error
        if not whole:
            self._append(self.header)

    def record(self, key: Key, value: float, work: int) -> None:
        """Keep one finished evaluation; returns when it is on the disk."""
        self.entries[key] = value, work
        self._append({"drops": key, "value": value, "work": work})

    def close(self) -> None:
        self._file.close()

    def _append(self, row: Mapping[str, object]) -> None:
        self._file.write(json.dumps(row).encode() + b"\n")  # repr of a float: exact
        self._file.flush()
        os.fsync(self._file.fileno())

    def _load(self, lines: list[bytes]) -> None:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if number > 1:
                    self.entries[tuple(row["drops"])] = _figure(row["value"]), int(row["work"])
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(
                    f"search ledger {self.path} is damaged in line {number}; remove it to search anew"
                ) from error
            if number == 1 and row != json.loads(json.dumps(self.header)):
                raise InputError(
                    f"search ledger {self.path} belongs to another search ({_difference(row, self.header)}); "
                    f"remove it to search anew"
                )


def _figure(value: object) -> float:
    if not isinstance(value, float | int) or isinstance(value, bool) or math.isnan(value):
        raise ValueError(f"{value!r} is no figure")
    return float(value)


class Memo(Generic[C]):
    """An objective that is asked about sets of drops, and never twice about the same one.

    The objective itself is only touched for a figure that is not known yet. A search that is run again over the ledger
    of an interrupted one therefore goes through the finished part at once, and counts the same work and the same
    evaluations as if it had never been interrupted: the recorded work is charged when a figure is first asked for,
    bringing the objective back to where it was is not.
    """

    def __init__(self, objective: Objective[C], ledger: Ledger | None = None) -> None:
        self._objective = objective
        self._ledger = ledger
        self._known: dict[Key, float] = {}
        # Base and drops of the last paid evaluation, replayed or not.
        self._position: tuple[frozenset[C], frozenset[C]] | None = None
        self._awake = True
        self.work = objective.work
        self.evaluations = 0

    def at(self, drops: frozenset[C], base: frozenset[C] | None = None) -> float:
        """The figure with ``drops`` dropped, reached from ``base``, by default from there itself. Figures that share
        one base are cheapest asked for one after another: a new base is moved to."""
        base = drops if base is None else base
        key = _key(drops)
        if key in self._known:
            return self._known[key]
        if self._ledger is not None and key in self._ledger.entries:
            value, work = self._ledger.entries[key]
            self._awake = False
        else:
            value, work = self._evaluate(base, drops, key)
            if self._ledger is not None:
                self._ledger.record(key, value, work)
        self._position = base, drops
        self._known[key] = value
        self.work += work
        self.evaluations += 1
        return value

    def _evaluate(self, base: frozenset[C], drops: frozenset[C], key: Key) -> tuple[float, int]:
        if not self._awake and self._position is not None:
            self._ask(*self._position, moved=True)
        self._awake = True
        before = self._objective.work
        value = self._ask(base, drops, moved=self._position is None or self._position[0] != base)
        if math.isnan(value):
            raise InputError(f"the objective is NaN with these units dropped: {', '.join(key)}")
        return value, self._objective.work - before

    def _ask(self, base: frozenset[C], drops: frozenset[C], moved: bool) -> float:
        if moved:
            self._objective.move(base)
        return self._objective.at(drops)


def _difference(row: object, header: Mapping[str, object]) -> str:
    theirs = row if isinstance(row, dict) else {}
    fields = [k for k in sorted({*theirs, *header}) if theirs.get(k) != json.loads(json.dumps(header.get(k)))]
    return f"{fields[0]} is {theirs.get(fields[0])!r} there and {header.get(fields[0])!r} here"
