"""What healing brought, from the cut to the result."""

from __future__ import annotations

from dataclasses import dataclass

from billhook.plan.record import Run, TextEvidence
from billhook.report.numbers import number


@dataclass(frozen=True)
class Stage:
    """The model at one point of its way, and its evidence on each text."""

    name: str
    evidence: tuple[TextEvidence, ...]


def stages(run: Run) -> list[Stage]:
    """The cut alone, what a training began with, and the result; those that were measured."""
    healing = run.healing
    training = healing.training if healing else None
    found = [
        Stage("cut and not yet healed", healing.unhealed if healing else ()),
        Stage("not yet trained", training.untrained if training else ()),
        Stage("compressed", run.evidence),
    ]
    return [stage for stage in found if stage.evidence]


def away(run: Run) -> str:
    """Said where a training led away from the dense model, as one towards the text may, with the greatest rise over the
    texts; else empty."""
    training = run.healing.training if run.healing else None
    pairs = zip(training.untrained, run.evidence, strict=False) if training else ()
    risen = [(before, after) for before, after in pairs if after.kl.value > before.kl.value]
    if not risen:
        return ""
    before, after = max(risen, key=lambda pair: pair[1].kl.value - pair[0].kl.value)
    nearer = after.perplexity_compressed.value < before.perplexity_compressed.value
    figures = f"KL {number(before.kl.value)} → {number(after.kl.value)}"
    return f"{'Nearer to the text, further' if nearer else 'Further'} from the dense model: {figures}."
