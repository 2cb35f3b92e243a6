"""What healing brought, from the cut to the result."""

from __future__ import annotations

from dataclasses import dataclass

from billhook.plan.record import HealRecord, Run, TextEvidence
from billhook.report.headline import furthest
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


def way(healing: HealRecord) -> str:
    """``closed-form, then lora``, whether the refit was refused, and what was tried later and brought nothing."""
    found = ", then ".join(step.method for step in healing.steps)
    if healing.refused:
        found += f", {'the refit before it ' if healing.training else ''}refused: it made nothing better"
    tried = " and ".join(step.method for step in healing.in_vain)
    return f"{found} ({tried} tried later, in vain)" if tried else found


def sentence(run: Run) -> str:
    """The way of healing, then perplexity and divergence at each stage on the text furthest from the calibration; empty
    where nothing was healed."""
    healing = run.healing
    if healing is None:
        return ""
    found, text = stages(run), furthest(run.evidence)
    if text is None or len(found) < 2 or (healing.refused and healing.training is None):
        return f"{way(healing)}."
    which = run.evidence.index(text)
    texts = [stage.evidence[which] for stage in found]
    names = [*(f" ({stage.name})" for stage in found[:-1]), ""]
    perplexity = " → ".join(
        f"{number(t.perplexity_compressed.value)}{name}" for t, name in zip(texts, names, strict=True)
    )
    divergence = " → ".join(number(t.kl.value) for t in texts)
    return f"{way(healing)}; on {text.name}: perplexity {perplexity}, KL {divergence}."


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
