"""What a comparison of run-time policies leaves behind: the content of its ``comparison.json`` and page. Pure data."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from billhook.plan.outline import Outline
from billhook.plan.policy_record import Drafting, Savings
from billhook.plan.record import ProbeEvidence, TextEvidence, Timing


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PolicyEntry(_Record):
    """One policy at one setting: the work that it left out, how fast the model then wrote, and how well.

    ``name`` tells it from the others. ``asked`` is the work or the cache that its dial was turned for (``flops=0.8``,
    ``kv_bytes=0.5``), empty where the setting was given. ``baseline`` marks a choice that looks at nothing, the plain
    model included. ``timing`` is one call of ``generate`` against the plain model in turns. A policy that leaves the
    text as it is has ``drafting`` in place of savings, evidence and probes. Where it is not possible on this model,
    ``refused`` says why.
    """

    name: str
    policy: str
    asked: str
    baseline: bool = False
    refused: str = ""
    parameters: dict[str, object] = {}
    kv: str = ""
    savings: Savings | None = None
    evidence: tuple[TextEvidence, ...] = ()
    probes: tuple[ProbeEvidence, ...] = ()
    drafting: Drafting | None = None
    timing: Timing | None = None
    seconds: float = 0.0

    @property
    def damage(self) -> float:
        """How many times the perplexity of the plain model, at the geometric mean over the texts. 1 is no damage."""
        product = 1.0
        for text in self.evidence:
            product *= text.perplexity_ratio.value
        return float(product ** (1 / max(len(self.evidence), 1)))

    @property
    def speedup(self) -> float:
        """How many times as fast as the plain model in the same turns; 1 where it is the plain model."""
        return self.timing.speedup.value if self.timing else 1.0

    @property
    def exact(self) -> float | None:
        """The mean share of exact answers over the probes; None where nothing was asked."""
        return sum(p.compressed for p in self.probes) / len(self.probes) if self.probes else None


class PolicyComparison(_Record):
    """Every policy at every amount of what it spares, on one model and the same text."""

    schema_version: Literal[1] = 1
    model: str
    outline: Outline
    calibration: str
    budgets: tuple[str, ...]
    given: tuple[str, ...]
    """The policies that were asked for, in words; empty for those that come along."""
    entries: tuple[PolicyEntry, ...]
    seed: int = 0
    environment: dict[str, str] = {}
    seconds: dict[str, float] = {}

    def at(self, budget: str) -> list[PolicyEntry]:
        """The entries at a budget (or, for "", as given), the least damaged first."""
        met = (entry for entry in self.entries if entry.asked == budget and not entry.refused)
        return sorted(met, key=lambda entry: (entry.damage, -entry.speedup, entry.name))

    @property
    def plain_exact(self) -> float | None:
        """The mean share of exact answers of the plain model."""
        probes = next((entry.probes for entry in self.entries if entry.probes), ())
        return sum(p.dense for p in probes) / len(probes) if probes else None
