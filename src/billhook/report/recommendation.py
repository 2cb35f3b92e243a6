"""What a comparison comes to, in plain sentences computed from its numbers."""

from __future__ import annotations

import math

from billhook.plan.comparison import Comparison, Entry
from billhook.plan.target import Target
from billhook.report.answers import accuracy
from billhook.report.figures_comparison import name
from billhook.report.numbers import number, percent


def recommendation(comparison: Comparison) -> list[str]:
    """At least one sentence. First the best method overall, by the geometric mean of its damage over the budgets;
    then each budget, with the exact answers and how much the best repeats itself; then who fails to beat evenly spaced
    removal, which looks at nothing."""
    budgets = [budget for budget in comparison.budgets if comparison.at(budget)]
    if not budgets:
        return ["No method could meet any of these budgets on this model."]
    sentences = [_overall(comparison, budgets)]
    sentences += [_at(comparison, budget) for budget in budgets]
    idle = _idle(comparison, budgets)
    if idle:
        sentences.append(f"No better than evenly spaced removal somewhere: {'; '.join(idle)}.")
    return sentences


def _overall(comparison: Comparison, budgets: list[str]) -> str:
    best = _best_over(comparison, budgets, None)
    if best is None:
        return _in_part(comparison, budgets)
    words = f"Use {best}: over these budgets its perplexity is the lowest on average among those that look at the model"
    plain = _best_over(comparison, budgets, Target.UNIFORM)
    if plain is not None and plain != best:
        words += f". If the result must load in any engine, use {plain}"
    return f"{words}."


def _in_part(comparison: Comparison, budgets: list[str]) -> str:
    """Where no method met every budget: the one that met most of them, of several the one with the least damage."""
    met = _damages(comparison, budgets, None)
    if not met:
        return "No method that looks at the model met any of these budgets."
    best = min(met, key=lambda who: (-len(met[who]), sum(met[who].values()), who))
    return f"Use {best} at {' and '.join(met[best])}; no method that looks at the model met every budget."


def _best_over(comparison: Comparison, budgets: list[str], target: Target | None) -> str | None:
    """The method with the least damage at the geometric mean over all budgets; None if none met them all."""
    damages = _damages(comparison, budgets, target)
    complete = {who: sum(logs.values()) for who, logs in damages.items() if len(logs) == len(budgets)}
    return min(complete, key=lambda who: (complete[who], who)) if complete else None


def _damages(comparison: Comparison, budgets: list[str], target: Target | None) -> dict[str, dict[str, float]]:
    """The log of the damage at each budget that it met, for every method that looks at something."""
    damages: dict[str, dict[str, float]] = {}
    for budget in budgets:
        for entry in comparison.at(budget):
            if target in (None, entry.target) and not entry.baseline:
                damages.setdefault(name(entry, comparison), {})[budget] = math.log(entry.damage)
    return damages


def _at(comparison: Comparison, budget: str) -> str:
    first, *others = comparison.at(budget)
    words = f"At {budget}, {name(first, comparison)} is best with {number(first.damage)} times the perplexity of dense"
    if first.healed:
        words += f" after healing, {number(first.damage_as_cut)} before"
    close = [name(entry, comparison) for entry in others if _overlap(entry, first)]
    if close:
        words += f"; within its 95% interval on every text: {', '.join(close)}"
    return f"{words}.{_answers(comparison, [first, *others])}{_repetition(first)}"


def _answers(comparison: Comparison, entries: list[Entry]) -> str:
    """What likelihood does not show: the exact answers of the best, and who answers more of those that look at the
    model."""
    shares = {
        name(e, comparison): accuracy(e.probes) for e in entries if e.probes and (e is entries[0] or not e.baseline)
    }
    best = name(entries[0], comparison)
    if best not in shares:
        return ""
    dense, now = shares[best]
    words = f" It answers {percent(now)} of the questions exactly right, the dense model {percent(dense)}"
    most = max(shares, key=lambda who: shares[who][1])
    if shares[most][1] > now:
        words += f"; most of all does {most}, {percent(shares[most][1])}"
    return f"{words}."


def _repetition(entry: Entry) -> str:
    """What perplexity hides as well: how often it writes the same again."""
    if entry.repeated is None:
        return ""
    before, after = (percent(share) for share in entry.repeated)
    return f" Of its runs of four tokens {after} came before in the same text, of the dense model's {before}."


def _overlap(one: Entry, other: Entry) -> bool:
    """Whether the intervals of both meet on every text."""
    pairs = [(a.perplexity_ratio, b.perplexity_ratio) for a, b in zip(one.judged, other.judged, strict=True)]
    return all(a.low <= b.high and b.low <= a.high for a, b in pairs)


def _idle(comparison: Comparison, budgets: list[str]) -> list[str]:
    """``["first at params=0.9 and params=0.8", ...]``; of the methods that look at something."""
    where: dict[str, list[str]] = {}
    for budget in budgets:
        entries = comparison.at(budget)
        even = next((entry for entry in entries if entry.recipe == "evenly-spaced"), None)
        for entry in entries:
            if even is not None and not entry.baseline and entry.damage >= even.damage:
                where.setdefault(name(entry, comparison), []).append(budget)
    return [f"{who} at {' and '.join(places)}" for who, places in where.items()]
