"""The first screen: title, verdict and the handful of figures that matter."""

from __future__ import annotations

from dataclasses import dataclass

from billhook.plan.address import Address
from billhook.plan.budget import Budget, within
from billhook.plan.record import Returned, Run, TextEvidence, Timing
from billhook.report.answers import accuracy
from billhook.report.cuts import counts, zeros_in
from billhook.report.numbers import number, percent, quantity, ranges, spread

BUDGETS = {
    "params": "block parameters",
    "size": "file size",
    "flops": "FLOPs",
    "latency": "latency",
    "memory": "memory",
    "kv_bytes": "KV cache",
    "blocks": "blocks",
}


@dataclass(frozen=True)
class Tile:
    """One figure of the headline: its name, the figure large, and what belongs to it small."""

    name: str
    figure: str
    note: str


def budget_name(name: str) -> str:
    """A budget in words."""
    return BUDGETS.get(name, name.replace("_", " "))


def asked_fractions(run: Run) -> dict[str, float]:
    """The budgets that were asked for as fractions of dense, absolute ones where the dense cost is known."""
    found = {}
    for limit in Budget.parse(run.asked).limits if run.asked else ():
        if limit.relative:
            found[limit.kind] = limit.amount
        elif limit.kind in run.costs and run.costs[limit.kind].dense > 0:
            found[limit.kind] = limit.amount / run.costs[limit.kind].dense
    return found


def title(run: Run) -> str:
    """What the page is about, for the browser's tab and the model card."""
    if run.returned:
        return f"{run.model}, part of the way back to {run.returned.base}"
    if run.plan.empty:
        return f"{run.model}: what it may not need"
    if "params" in run.realised and _only_sparse(run):
        return f"{run.model} with {percent(_gone(run))} of its block parameters set to zero"
    if "params" in run.realised:
        return f"{run.model} without {percent(_gone(run))} of its block parameters"
    return f"{run.model} without {counts(run)}"


def verdict(run: Run) -> str:
    """One sentence computed from the numbers; the text is the one furthest from the calibration."""
    if run.returned:
        return _returned(run, run.returned)
    if run.plan.empty:
        blocks = sum(1 for _ in run.outline.blocks())
        size = quantity(run.outline.block_params, "parameters")
        return f"Nothing was cut: {run.model} has {blocks} blocks with {size}, and this is what was measured of them."
    cut = counts(run)
    if "params" in run.realised:
        cut += f" ({percent(_gone(run))} of the block parameters)"
    sentence = f"Without {cut}"
    facts = [_speed_fact(run.timings)] if run.timings else []
    text = furthest(run.evidence)
    facts += [_quality_fact(text)] if text else []
    if not facts:
        less = "sparser" if _only_sparse(run) else "smaller"
        return f"{sentence}, the model is {less}; how well it still works was not measured."
    return f"{sentence}, {' and '.join(facts)}."


def _returned(run: Run, returned: Returned) -> str:
    """What became of a model on its way back; on the rest of the page the model as it was is the dense one."""
    same = [Address.parse(name) for name, share in returned.kept.items() if share == 0]
    if set(returned.kept.values()) <= {0.0, 1.0}:
        where = ranges(block.block for block in same)
        what = f"With {len(same)} of {len(returned.kept)} blocks as in {returned.base} ({where})"
    else:
        shares = list(returned.kept.values())
        what = f"With {percent(shares[0])} (first block) to {percent(shares[-1])} (last) of what training changed"
    facts = []
    if returned.diversity and returned.validity:
        (before, after), (valid, still) = returned.diversity, returned.validity
        facts.append(
            f"the diversity of random characters goes from {number(before)} to {number(after)} and the share of valid "
            f"ones from {percent(valid)} to {percent(still)}"
        )
    text = furthest(run.evidence)
    facts += [_quality_fact(text)] if text else []
    rest = "Nothing was cut; what is called dense below is the model as it was, and compressed is the result."
    return f"{what}, {' and '.join(facts)}. {rest}" if facts else f"{what}. {rest}"


def _only_sparse(run: Run) -> bool:
    """Whether nothing was taken out: single weights are zero."""
    plan = run.plan
    return bool(plan.sparsities) and not (plan.drops or plan.keeps or plan.channels or plan.factors or plan.schedule)


def _gone(run: Run) -> float:
    """The share of the block parameters that was cut, whatever was put beside the others."""
    if _only_sparse(run):
        return sum(map(zeros_in, run.plan.sparsities)) / run.outline.block_params
    return 1 - run.realised["params"]


def furthest(evidence: tuple[TextEvidence, ...]) -> TextEvidence | None:
    """The text that is least like the calibration."""
    return next((t for t in evidence if t.domain == "other"), next(iter(evidence), None))


def tiles(run: Run) -> list[Tile]:
    """Asked against realised budgets, perplexity and divergence per text, exact answers, speed-ups; only what was
    measured."""
    asked = asked_fractions(run)
    budgets = [name for name in run.realised if name in asked] or list(run.realised)[:1]
    found = []
    for name in budgets:
        note = f"asked: {percent(asked[name])}" if name in asked else f"asked: {run.asked}" if run.asked else ""
        if name in asked and not within(run.realised[name], asked[name]):
            note += " (not reached)"
        found.append(Tile(f"{budget_name(name)} kept", percent(run.realised[name]), note))
    for text in run.evidence:
        before, after = text.perplexity_dense, text.perplexity_compressed
        found.append(
            Tile(
                f"perplexity · {text.name}",
                f"{number(before.value)} → {number(after.value)}",
                f"{spread(before)} → {spread(after)}",
            )
        )
    other = furthest(run.evidence)
    if other:
        found.append(Tile("divergence (KL)", number(other.kl.value), f"nats per token, {spread(other.kl)}"))
        note = f"{spread(other.top1, as_percent=True)}, {other.name}"
        found.append(Tile("same next token", percent(other.top1.value), note))
    if run.probes:
        dense, compressed = (percent(share) for share in accuracy(run.probes))
        found.append(Tile("exact answers", f"{dense} → {compressed}", f"mean of {len(run.probes)} probes"))
    for timing in run.timings:
        note = f"{number(timing.speedup.low)} to {number(timing.speedup.high)}, {timing.engine}"
        found.append(Tile(f"speed · {timing.workload.name}", f"{number(timing.speedup.value)}×", note))
    return found


def _speed_fact(timings: tuple[Timing, ...]) -> str:
    faster = [t for t in timings if t.speedup.low > 1]
    if not faster:
        return "the model runs no faster"
    values = sorted(number(t.speedup.value) for t in faster)
    what = f"{values[0]} times" if values[0] == values[-1] else f"{values[0]} to {values[-1]} times"
    if len(faster) == len(timings):
        return f"the model runs {what} as fast"
    return f"the model runs {what} as fast in {len(faster)} of {len(timings)} workloads"


def _quality_fact(text: TextEvidence) -> str:
    ratio = text.perplexity_ratio
    agree = f"agreeing with the original on {percent(text.top1.value)} of next tokens"
    if ratio.low <= 1 <= ratio.high:
        return f"its perplexity on {text.name} is not measurably changed ({spread(ratio)} times), {agree}"
    before, after = number(text.perplexity_dense.value), number(text.perplexity_compressed.value)
    return f"its perplexity on {text.name} goes from {before} to {after} ({number(ratio.value)} times), {agree}"
