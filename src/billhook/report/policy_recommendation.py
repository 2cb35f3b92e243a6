"""What a comparison of policies comes to, in plain sentences computed from its numbers."""

from __future__ import annotations

import math

from billhook.plan.policy_comparison import PolicyComparison, PolicyEntry
from billhook.plan.record import Interval
from billhook.report.numbers import number, percent

LIKELY = 1.1
"""Damage up to which a text's likelihood hardly shows anything."""


def policy_recommendation(comparison: PolicyComparison) -> list[str]:
    """At least one sentence: the best policy overall, those that leave the text as it is, the best at each amount of
    work and of cache, and then who saves no time though it leaves out work, who is no better than skipping evenly, and
    whose losses likelihood hides."""
    budgets = [budget for budget in comparison.budgets if any(not e.baseline for e in comparison.at(budget))]
    work = [budget for budget in budgets if budget.startswith("flops")]
    free = [entry for entry in comparison.at("") if entry.drafting is not None]
    sentences = [_overall(comparison, work, free)] if work or not budgets else []  # time is no aim of sparing cache
    sentences += [_unchanged(entry) for entry in free]
    sentences += [_at(comparison, budget) for budget in budgets]
    lazy = [e for e in _looking(comparison) if e.savings and e.asked.partition("=")[0] != "kv_bytes"]
    slow = [f"{_called(e)} ({_range(e.timing.speedup)})" for e in lazy if e.timing and not _faster(e)]
    if slow:
        sentences.append(f"Leaves out work and is not certain to save time here: {', '.join(slow)}.")
    idle = _idle(comparison)
    if idle:
        sentences.append(f"No better than skipping blocks evenly: {', '.join(idle)}.")
    hidden = [_called(entry) for entry in _looking(comparison) if entry.damage < LIKELY and _forgets(entry)]
    if hidden:
        sentences.append(
            f"Loses exact answers though the perplexity is within {percent(LIKELY - 1)} of the plain model's: "
            f"{', '.join(hidden)}."
        )
    return sentences


def _overall(comparison: PolicyComparison, budgets: list[str], free: list[PolicyEntry]) -> str:
    quick = max((e for e in free if _faster(e)), key=lambda e: e.speedup, default=None)
    damages: dict[str, list[float]] = {}
    for budget in budgets:
        for entry in comparison.at(budget):
            if not entry.baseline and _faster(entry):
                damages.setdefault(entry.name, []).append(math.log(entry.damage))
    whole = {name: sum(logs) for name, logs in damages.items() if len(logs) == len(budgets)}
    best = min(whole, key=lambda name: (whole[name], name)) if whole else None
    if quick is not None:
        more = f"; where the text may change, {best} costs least of those that save time everywhere" if best else ""
        return f"Use {quick.name}: {number(quick.speedup)} times as fast, and the text stays as it is{more}."
    given = [e for e in comparison.entries if not e.asked and not e.baseline and not e.refused and e not in free]
    if best is None and (helpful := min((e for e in given if _faster(e)), key=lambda e: e.damage, default=None)):
        gain, harm = number(helpful.speedup), number(helpful.damage)
        return f"{helpful.name}, as given, is {gain} times as fast at {harm} times the perplexity of the plain model."
    if best is None:
        asked = " at every amount of work" if budgets else ""
        return f"Run the plain model: no policy was faster{asked} on this machine."
    return f"Use {best}: of those that save time at every amount of work its perplexity is the lowest on average."


def _unchanged(entry: PolicyEntry) -> str:
    gain = "worth it here" if _faster(entry) else "no gain on this machine"
    return f"{entry.name} leaves the text as it is and is {number(entry.speedup)} times as fast: {gain}."


def _at(comparison: PolicyComparison, budget: str) -> str:
    first, *others = [entry for entry in comparison.at(budget) if not entry.baseline]
    words = (
        f"At {budget}, {first.name} has the lowest perplexity, {number(first.damage)} times that of the plain model, "
        f"and is {number(first.speedup)} times as fast"
    )
    if first.exact is not None and comparison.plain_exact is not None:
        words += f"; exact answers {percent(first.exact)}, plain {percent(comparison.plain_exact)}"
    fastest = max([first, *others], key=lambda entry: entry.speedup)
    if fastest is not first and fastest.speedup > first.speedup:
        words += f". The fastest is {fastest.name}, {number(fastest.speedup)} times"
        words += f" at {number(fastest.damage)} times the perplexity"
    return f"{words}."


def _faster(entry: PolicyEntry) -> bool:
    """In three of four rounds at least."""
    return entry.timing is not None and entry.timing.speedup.low > 1


def _range(speedup: Interval) -> str:
    return f"{number(speedup.value)}×, quartiles {number(speedup.low)} to {number(speedup.high)}"


def _looking(comparison: PolicyComparison) -> list[PolicyEntry]:
    return [entry for entry in comparison.entries if not entry.baseline and not entry.refused]


def _called(entry: PolicyEntry) -> str:
    return f"{entry.name} at {entry.asked}" if entry.asked else entry.name


def _idle(comparison: PolicyComparison) -> list[str]:
    """Those that damage as much as even skipping at the same work."""
    even = {entry.asked: entry.damage for entry in comparison.entries if entry.name == "even-skip" and entry.evidence}
    return [_called(e) for e in _looking(comparison) if e.asked in even and e.damage >= even[e.asked]]


def _forgets(entry: PolicyEntry) -> bool:
    """Over all items together, measurably fewer exact answers: the normal approximation of the mean of the probes."""
    if not entry.probes:
        return False
    change = sum(p.difference.value for p in entry.probes) / len(entry.probes)
    halves = [(p.difference.high - p.difference.low) / 2 for p in entry.probes]
    return change + math.sqrt(sum(h * h for h in halves)) / len(halves) < 0
