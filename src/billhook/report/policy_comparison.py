"""The page of a comparison of run-time policies."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from billhook.plan.address import Address
from billhook.plan.policy_comparison import PolicyComparison, PolicyEntry
from billhook.report.comparison import Cell, Grid, Row
from billhook.report.figures_policies import policy_front, policy_pictures
from billhook.report.numbers import duration, number, percent
from billhook.report.page import rendered
from billhook.report.policy_recommendation import policy_recommendation


def policy_comparison_page(comparison: PolicyComparison) -> str:
    """A comparison as one self-contained HTML page; every string from it is escaped."""
    return rendered("policy_comparison.html", _context(comparison))


def write_policy_comparison(comparison: PolicyComparison, folder: Path) -> None:
    """``comparison.json`` and ``comparison.html`` into an existing folder."""
    (folder / "comparison.json").write_text(comparison.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (folder / "comparison.html").write_text(policy_comparison_page(comparison), encoding="utf-8")


def budget_in_words(budget: str) -> str:
    """``flops=0.8`` as "Running 80.0% of the work"."""
    kind, _, share = budget.partition("=")
    if not kind:
        return "As given"
    words = "Keeping {} of the cache" if kind == "kv_bytes" else "Running {} of the work"
    return words.format(percent(float(share)))


def setting(entry: PolicyEntry) -> str:
    """The parameters of a policy in short: tables of numbers are left to the record."""
    short = {name: value for name, value in entry.parameters.items() if isinstance(value, (str, int, float))}
    return ", ".join(f"{name}={number(v) if isinstance(v, float) else v}" for name, v in short.items() if v != "")


def _context(comparison: PolicyComparison) -> dict[str, Any]:
    judged = next((entry for entry in comparison.entries if entry.evidence), None)
    drawn = policy_pictures(comparison)
    advice = policy_recommendation(comparison)
    front = policy_front(comparison)
    budgets = [budget for budget in (*comparison.budgets, "") if any(e.asked == budget for e in comparison.entries)]
    return {
        "title": f"{comparison.model}: which policy runs it best",
        "verdict": advice[0],
        "texts": [text.name for text in judged.evidence] if judged else [],
        "plain_exact": comparison.plain_exact,
        "pictures": drawn,
        "parts": [
            {
                "name": budget_in_words(budget),
                "stacks": _grids(comparison, comparison.at(budget)),
                "entries": [(entry, entry in front, setting(entry)) for entry in comparison.at(budget)],
                "refused": [(e.name, e.refused) for e in comparison.entries if e.asked == budget and e.refused],
            }
            for budget in budgets
        ],
        "recommendation": advice,
        "facts": _facts(comparison),
        "drawing": bool(drawn),
    }


def _grids(comparison: PolicyComparison, entries: list[PolicyEntry]) -> list[Grid]:
    """How often a generated token runs each sublayer, of the stacks of which something was left out."""
    shares = [entry.savings.sublayers if entry.savings else {} for entry in entries]
    touched = {Address.parse(unit).stack for found in shares for unit in found}
    grids = []
    for stack in comparison.outline.stacks:
        if stack.name not in touched:
            continue
        rows = []
        for entry, found in zip(entries, shares, strict=True):
            blocks = []
            for index, block in enumerate(stack.blocks):
                units = [Address(stack.name, index, kind) for kind in block.sublayers]
                blocks.append(tuple(_cell(unit, found.get(str(unit), 1.0)) for unit in units))
            if found:
                rows.append(Row(entry.name, entry.baseline, tuple(blocks)))
        grids.append(Grid(stack.name, len(stack.blocks), tuple(rows)))
    return grids


def _cell(unit: Address, runs: float) -> Cell:
    """Empty where no token runs it, in part where some do."""
    left = round(100 * runs, 1) if 0 < runs < 1 else None
    return Cell(unit.sublayer or "", runs == 0, f"{unit}: {runs:.2f} runs a token", left)


def _command(comparison: PolicyComparison) -> str:
    """What makes the same comparison again; the baselines take part without being named."""
    options = [("budget", ",".join(comparison.budgets)), ("calibration", comparison.calibration)]
    options += [("policy", text) for text in comparison.given]
    options.append(("seed", str(comparison.seed)))
    given = " ".join(f"--{option} {shlex.quote(value)}" for option, value in options)
    return f"billhook policies compare {shlex.quote(comparison.model)} {given} --out DIR"


def _facts(comparison: PolicyComparison) -> list[tuple[str, str]]:
    judged = next((entry.evidence for entry in comparison.entries if entry.evidence), ())
    timing = next((entry.timing for entry in comparison.entries if entry.timing), None)
    found = [("command", _command(comparison)), ("calibration", comparison.calibration)]
    found += [(f"judged on {text.name}", f"{text.tokens:,} tokens; {text.protocol}") for text in judged]
    if timing is not None:
        work = timing.workload
        found.append(("timed", f"{work.prompt_tokens} tokens read and {work.new_tokens} written by generate, "
                      f"{timing.rounds} rounds in turns with the plain model; {timing.engine}"))  # fmt: skip
    rules = {entry.policy: entry.kv for entry in comparison.entries if entry.kv}
    found += [(f"keys and values: {policy}", rule) for policy, rule in rules.items()]
    found += [(f"time: {step}", duration(seconds)) for step, seconds in comparison.seconds.items()]
    return [*found, *comparison.environment.items()]
