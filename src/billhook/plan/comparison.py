"""What a comparison of methods leaves behind: the content of ``comparison.json`` and of its page. Pure data."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from billhook.plan.outline import Outline
from billhook.plan.plan import Factorise, HiddenChannels, Keep, Plan, Sparsify
from billhook.plan.record import ProbeEvidence, TextEvidence
from billhook.plan.schedule import Schedule
from billhook.plan.target import Target


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Entry(_Record):
    """One recipe at one budget: what it dropped, kept in part, made sparse, took apart, which ``channels`` of a stream
    it kept, or had share weights (``schedule``), what finding that took, and how well the model works without it.

    ``baseline`` marks a choice that looks at nothing. Where the recipe cannot meet the budget on this model, or its
    result cannot be made, healed or judged, ``refused`` says why and there is no evidence. ``evidence`` is of the model
    as it was cut, ``healed`` of the same after healing in closed form, empty where nothing was healed; ``probes`` are
    answered by the healed one where there is one; ``repeated`` is the share of 4-grams that came before in the same
    greedy continuation, of the dense model and of the one that answers (None where it was not measured). ``work``
    counts block-token forwards of the search alone; ``seconds`` are those of the search in this run, fewer where
    another recipe had paid for the same figures.
    """

    recipe: str
    seed: int
    baseline: bool
    asked: str
    target: Target
    refused: str = ""
    drops: tuple[str, ...] = ()
    keeps: tuple[Keep, ...] = ()
    sparsities: tuple[Sparsify, ...] = ()
    factors: tuple[Factorise, ...] = ()
    channels: tuple[HiddenChannels, ...] = ()
    schedule: Schedule | None = None
    realised: dict[str, float] = {}
    work: int = 0
    evaluations: int = 0
    seconds: float = 0.0
    evidence: tuple[TextEvidence, ...] = ()
    healed: tuple[TextEvidence, ...] = ()
    probes: tuple[ProbeEvidence, ...] = ()
    repeated: tuple[float, float] | None = None

    @property
    def plan(self) -> Plan:
        return Plan.of(self.drops, self.target, self.keeps, channels=self.channels).model_copy(
            update={"schedule": self.schedule}
        )

    @property
    def judged(self) -> tuple[TextEvidence, ...]:
        """The evidence that counts: of the healed model where there is one."""
        return self.healed or self.evidence

    @property
    def damage(self) -> float:
        """How many times the perplexity of dense, at the geometric mean over the texts. 1 is no damage."""
        return _damage(self.judged)

    @property
    def damage_as_cut(self) -> float:
        """The same of the model as it was cut."""
        return _damage(self.evidence)


def _damage(evidence: tuple[TextEvidence, ...]) -> float:
    product = 1.0
    for text in evidence:
        product *= text.perplexity_ratio.value
    return float(product ** (1 / len(evidence)))


class Comparison(_Record):
    """Every recipe at every budget, on one model and one calibration. ``recipes`` and ``dtype``: as they were asked
    for; none are all that come along, and "" is the dtype of the model. None: not on record. ``surveyed``: tokens of
    the longer text that statistics of one pass were taken of and acts fitted weights to, 0 where no method did."""

    schema_version: Literal[1] = 1
    model: str
    outline: Outline
    calibration: str
    tokens: int
    surveyed: int = 0
    budgets: tuple[str, ...]
    entries: tuple[Entry, ...]
    titles: dict[str, str]
    recipes: tuple[str, ...] | None = None
    dtype: str = ""
    heal: Literal["closed-form", "none"] = "none"
    environment: dict[str, str] = {}
    seconds: dict[str, float] = {}

    def at(self, budget: str) -> list[Entry]:
        """The entries that met a budget, the least damaged first."""
        met = (entry for entry in self.entries if entry.asked == budget and not entry.refused)
        return sorted(met, key=lambda entry: (entry.damage, entry.recipe, entry.seed))
