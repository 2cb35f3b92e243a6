"""The page of a comparison: every method beside every other."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from billhook.plan.address import Address
from billhook.plan.budget import Budget
from billhook.plan.check import normalise
from billhook.plan.comparison import Comparison, Entry
from billhook.plan.record import TextEvidence
from billhook.plan.target import Target
from billhook.plan.visits import shared
from billhook.report.answers import accuracy
from billhook.report.cuts import narrower
from billhook.report.drawing import is_cut, left_of
from billhook.report.figures_comparison import ceiling, front, kept, name, quality
from billhook.report.headline import budget_name
from billhook.report.numbers import duration, number, percent
from billhook.report.page import rendered
from billhook.report.recommendation import recommendation

_HEALING = {
    "none": "none: every result is judged as it was cut, also where its recipe heals",
    "closed-form": "every result is judged as it was cut, and after its linears were refitted; order, curves, answers "
    "and recommendation go by the healed figures (acts that combine blocks make new weights themselves)",
}
LOADS = {Target.UNIFORM: "any engine", Target.REMOTE: "transformers, remote code"}


@dataclass(frozen=True)
class Cell:
    """``left``: percent of its parameters, if it got narrower; ``shared``: it runs with the weights of another one."""

    kind: str
    cut: bool
    title: str
    left: float | None = None
    shared: bool = False


@dataclass(frozen=True)
class Row:
    """One method in the grid: for each block of the stack, the cells of its sublayers."""

    name: str
    baseline: bool
    blocks: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Grid:
    """Which units each method dropped from one stack, and which it made narrower."""

    name: str
    blocks: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Line:
    """One method in the table of a budget; ``healed`` is empty where it was judged as cut alone."""

    name: str
    kept: float
    evidence: tuple[TextEvidence, ...]
    healed: tuple[TextEvidence, ...]
    judged: tuple[TextEvidence, ...]
    exact: str
    repeated: str
    passes: str
    work: int
    loads: str
    cuts: tuple[str, ...]
    on_front: bool


def comparison_page(comparison: Comparison) -> str:
    """A comparison as one self-contained HTML page; every string from it is escaped."""
    return rendered("comparison.html", _context(comparison))


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """``comparison.json`` and ``comparison.html`` into an existing folder."""
    (folder / "comparison.json").write_text(comparison.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (folder / "comparison.html").write_text(comparison_page(comparison), encoding="utf-8")


def budget_in_words(budget: str) -> str:
    """``params=0.8`` as "80.0% of the block parameters"."""
    limits = Budget.parse(budget).limits
    if len(limits) == 1 and limits[0].relative:
        return f"{percent(limits[0].amount)} of {budget_name(limits[0].kind)}"
    return budget


def passes(entry: Entry, comparison: Comparison) -> float:
    """The work of a search in passes of the whole stack over the calibration."""
    blocks = len(comparison.outline.stack("decoder").blocks)
    return entry.work / (blocks * comparison.tokens)


def exact_answers(entry: Entry) -> str:
    """The mean share of exact answers over the probes; a dash where nothing was asked."""
    return percent(accuracy(entry.probes)[1]) if entry.probes else "–"


def repeated(entry: Entry) -> str:
    """The share of its 4-grams that came before in the same text; a dash where nothing was written."""
    return percent(entry.repeated[1]) if entry.repeated else "–"


def _context(comparison: Comparison) -> dict[str, Any]:
    judged = next((entry for entry in comparison.entries if entry.evidence), None)
    drawn = quality(comparison)
    advice = recommendation(comparison)
    return {
        "title": f"{comparison.model}: which method cuts it best",
        "verdict": advice[0],
        "texts": [text.name for text in judged.evidence] if judged else [],
        "dense_answers": percent(accuracy(judged.probes)[0]) if judged and judged.probes else "",
        "dense_repeated": percent(judged.repeated[0]) if judged and judged.repeated else "",
        "pictures": drawn,
        "ceiling": number(top) if (top := ceiling(comparison)) else "",
        "parts": [_part(comparison, budget) for budget in comparison.budgets],
        "recommendation": advice,
        "facts": _facts(comparison),
        "drawing": bool(drawn),
        "heal": comparison.heal != "none",
    }


def _part(comparison: Comparison, budget: str) -> dict[str, Any]:
    entries = comparison.at(budget)
    best = front(comparison)
    return {
        "name": f"Keeping {budget_in_words(budget)}",
        "stacks": _grids(comparison, entries),
        "entries": [
            Line(
                name=name(entry, comparison),
                kept=kept(entry),
                evidence=entry.evidence,
                healed=entry.healed,
                judged=entry.judged,
                exact=exact_answers(entry),
                repeated=repeated(entry),
                passes=number(passes(entry, comparison), 2),
                work=entry.work,
                loads=LOADS[entry.target],
                cuts=(
                    *entry.drops,
                    *_tied(entry, comparison),
                    *narrower(entry.keeps, entry.sparsities, entry.factors, entry.channels),
                ),
                on_front=entry in best,
            )
            for entry in entries
        ],
        "refused": dict.fromkeys((e.recipe, e.refused) for e in comparison.entries if e.asked == budget and e.refused),
    }


def _grids(comparison: Comparison, entries: Sequence[Entry]) -> list[Grid]:
    """A grid for each stack in which something is cut."""
    drops = [normalise(map(Address.parse, entry.drops), comparison.outline) for entry in entries]
    lefts = [left_of(comparison.outline, e.keeps, e.sparsities, e.factors, e.channels) for e in entries]
    tied = [shared(entry.plan, comparison.outline) for entry in entries]
    touched = {unit.stack for units in (*drops, *lefts, *tied) for unit in units}
    grids = []
    for stack in comparison.outline.stacks:
        if stack.name not in touched:
            continue
        rows = []
        for entry, gone, left, ties in zip(entries, drops, lefts, tied, strict=True):
            blocks = []
            for index, block in enumerate(stack.blocks):
                units = [Address(stack.name, index, kind) for kind in block.sublayers]
                whose = ties.get(Address(stack.name, index))
                blocks.append(tuple(_cell(unit, is_cut(unit, gone), left.get(unit), whose) for unit in units))
            rows.append(Row(name(entry, comparison), entry.baseline, tuple(blocks)))
        grids.append(Grid(stack.name, len(stack.blocks), tuple(rows)))
    return grids


def _cell(unit: Address, cut: bool, left: float | None, whose: Address | None) -> Cell:
    title = str(unit) if left is None else f"{unit}: {left}% left"
    title += f" with the weights of {whose}" if whose else ""
    return Cell(unit.sublayer or "", cut, title, left, whose is not None)


def _tied(entry: Entry, comparison: Comparison) -> list[str]:
    """``decoder.3: the weights of decoder.2``, one a block that shares."""
    return [f"{new}: the weights of {first}" for new, first in sorted(shared(entry.plan, comparison.outline).items())]


def _command(comparison: Comparison) -> str:
    """What makes the same comparison again; the baselines take part without being named."""
    options = [("budget", ",".join(comparison.budgets)), ("calibration", comparison.calibration)]
    named = comparison.recipes
    if named is None:
        named = tuple(dict.fromkeys(e.recipe for e in comparison.entries if not e.baseline))
    options += [("recipe", who) for who in named]
    options += [("heal", comparison.heal)] if comparison.heal != "none" else []
    options.append(("seed", str(min(entry.seed for entry in comparison.entries))))
    options += [("dtype", comparison.dtype)] if comparison.dtype else []
    given = " ".join(f"--{option} {shlex.quote(value)}" for option, value in options)
    return f"billhook compare {shlex.quote(comparison.model)} {given} --out DIR"


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    judged = next((entry.evidence for entry in comparison.entries if entry.evidence), ())
    surveyed = f"; {comparison.surveyed:,} for statistics of one pass and new weights" if comparison.surveyed else ""
    found = [
        ("command", _command(comparison)),
        ("healing", _HEALING[comparison.heal]),
        ("calibration", f"{comparison.calibration}, {comparison.tokens:,} tokens{surveyed}"),
        *((f"judged on {text.name}", f"{text.tokens:,} tokens; {text.protocol}") for text in judged),
        *((f"time: {step}", duration(seconds)) for step, seconds in comparison.seconds.items()),
        *((title, value) for title, value in comparison.environment.items()),
    ]
    return [*found, *comparison.titles.items()]
