"""What the exact answers come to, and how much the continuations repeat themselves."""

from __future__ import annotations

from collections.abc import Sequence

from billhook.data.exercises import SUFFIX
from billhook.plan.record import Generation, ProbeEvidence, Run
from billhook.report.numbers import percent


def accuracy(probes: Sequence[ProbeEvidence]) -> tuple[float, float]:
    """Of dense and compressed, the mean over the probes (at least one)."""
    return sum(p.dense for p in probes) / len(probes), sum(p.compressed for p in probes) / len(probes)


def sentence(probes: Sequence[ProbeEvidence]) -> str:
    """What was lost, in words; empty where nothing was asked."""
    if not probes:
        return ""
    before, after = (percent(share) for share in accuracy(probes))
    worse = [p.name for p in probes if p.difference.high < 0]
    words = f"On average the dense model answers {before} exactly right and the compressed one {after}"
    if not worse:
        return f"{words}; in no probe does the whole interval lie below 0."
    where = "every probe" if len(worse) == len(probes) else "; ".join(worse)
    return f"{words}; measurably worse in: {where}."


def of_run(run: Run) -> str:
    """The sentence, and one more where such questions were practised."""
    steps = run.healing.steps if run.healing else ()
    read = [run.measures.calibration if run.measures else "", *(step.text for step in steps)]
    if not run.probes or not any(text.endswith(SUFFIX) for text in read):
        return sentence(run.probes)
    return f"{sentence(run.probes)} It read exercises of these kinds before, none of these questions among them."


def repetition(generations: Sequence[Generation]) -> tuple[float, float] | None:
    """Of dense and compressed, the mean share of repeated 4-grams over the prompts where it was measured."""
    pairs = [(g.repeated_dense, g.repeated_compressed) for g in generations]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not known:
        return None
    return sum(a for a, _ in known) / len(known), sum(b for _, b in known) / len(known)
