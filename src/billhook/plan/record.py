"""What a run leaves behind: the content of ``billhook.json``, of ``--json`` and of the report. Pure data."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from billhook.plan.audit import StackAudit
from billhook.plan.outline import Outline
from billhook.plan.plan import Plan

Select = Literal["distinct", "dsir", "loss", "gradient", "paser"]
"""The words for selecting the text of a training."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Interval(_Record):
    """A figure with its spread: a 95% confidence interval, or the quartiles of repeated timings."""

    value: float
    low: float
    high: float


class TextEvidence(_Record):
    """Dense and compressed on the same windows of one text the method never saw.

    ``protocol`` says in words how perplexity was taken (unit, context, stride, BOS). ``perplexity_ratio`` is the paired
    ratio compressed / dense. ``kl`` is the mean divergence from the dense model in nats per token, ``top1`` the
    share of tokens where both models would pick the same next token.
    """

    name: str
    domain: Literal["calibration", "other"]
    windows: int
    tokens: int
    protocol: str
    perplexity_dense: Interval
    perplexity_compressed: Interval
    perplexity_ratio: Interval
    kl: Interval
    top1: Interval


class ProbeEvidence(_Record):
    """Dense and compressed before the same questions, each with one exact answer.

    ``dense`` and ``compressed`` are the shares of the ``items`` answered right, ``difference`` is compressed - dense,
    paired."""

    name: str
    items: int
    dense: float
    compressed: float
    difference: Interval


class Generation(_Record):
    """The greedy continuations of one prompt, side by side, and of each the share of 4-grams that repeat an earlier
    one (None in records from before it was measured)."""

    prompt: str
    dense: str
    compressed: str
    repeated_dense: float | None = None
    repeated_compressed: float | None = None


class Workload(_Record):
    """``new_tokens`` 0 is a prefill."""

    name: str
    batch: int
    prompt_tokens: int
    new_tokens: int


class Timing(_Record):
    """One workload, dense and compressed interleaved in one process.

    ``speedup`` is the median over rounds of dense time / compressed time, with quartiles. ``ideal_speedup`` is what the
    removed blocks could give at best, from the measured time outside the blocks. Bytes are measured, not computed.
    """

    workload: Workload
    engine: str
    rounds: int
    dense_tokens_per_second: float
    compressed_tokens_per_second: float
    speedup: Interval
    ideal_speedup: float | None = None
    dense_peak_bytes: int | None = None
    compressed_peak_bytes: int | None = None
    dense_cache_bytes: int | None = None
    compressed_cache_bytes: int | None = None


class Step(_Record):
    """One step of a search: what was dropped in it and what was put back, at which score, what the objective was then
    (None where the search never looked), the realised budgets as fractions of dense, and the work so far in block-token
    forwards."""

    units: tuple[str, ...]
    restored: tuple[str, ...] = ()
    score: float | None
    objective: float | None
    realised: dict[str, float]
    work: int


class SearchRecord(_Record):
    """``work`` counts block-token forwards: blocks executed times tokens, exact on any machine. ``prior``: the earlier
    result that the search began with, if any. ``surveyed``: tokens of the longer text that statistics of one pass were
    taken of, 0 where there are none."""

    recipe: str
    objective: str
    steps: tuple[Step, ...]
    work: int
    evaluations: int
    prior: str = ""
    surveyed: int = 0


class Refit(_Record):
    """What came of one linear, or of a norm behind those that write; ``weight`` is the name of its parameter in the
    original model.

    ``before`` and ``after`` are an error on held-back windows, relative to the energy of its dense counterpart (mean
    over tokens): for a linear that writes and for a norm, of the stream after it; for one that reads, of what it is
    given; for the write of flattened blocks, of what it wrote with the units of both. ``penalty`` is the ridge that was
    chosen, relative to the mean energy of an input (of a channel that the norm puts out); None where no refit lowered
    the held-back error, and the old weights stay.
    """

    weight: str
    before: float
    after: float
    penalty: float | None

    @property
    def taken(self) -> bool:
        return self.penalty is not None


class Look(_Record):
    """One look at held-back text during a training: after ``step`` steps, the mean ``loss`` of the steps since the look
    before (None at the start) and that of the ``held`` text, in nats a token."""

    step: int
    loss: float | None
    held: float


class Group(_Record):
    """Windows of one kind: how many there are, how many of them were ``chosen``, and the mean ``harm`` that the cut did
    there (divergence from the dense model, nats a token)."""

    windows: int
    chosen: int
    harm: float


class SelectionRecord(_Record):
    """What a training read of its text, and ``why``. Of the ``parts`` of the text (lines, documents; windows where the
    model wrote it) ``duplicates`` were left out. Of the ``windows`` then left to learn from, ``chosen`` have a weight;
    they count like ``effective`` of equal weight (1 / sum of squares). ``target``: the text they are to be like.
    ``groups``: the kinds of text they came from; ``screened`` windows were passed over as conflicting."""

    word: Select
    why: str
    target: str = ""
    parts: int
    duplicates: int
    windows: int
    chosen: int
    effective: float
    groups: tuple[Group, ...] = ()
    screened: int = 0


class TrainingRecord(_Record):
    """What was trained and how it went. ``goal``: the next token of the text, or the dense model's distribution over
    it. ``ranks`` of the adapters, by block that stays. ``best`` is the step whose state was kept, 0 the untouched one.
    ``untrained`` is the evidence of the model that the training began with; ``selection`` says which of its text was
    read, where not all alike."""

    trains: str
    goal: Literal["text", "dense"]
    parameters: int
    ranks: tuple[int, ...] = ()
    tokens_a_step: int
    held_tokens: int
    curve: tuple[Look, ...]
    best: int
    stopped_early: bool
    untrained: tuple[TextEvidence, ...] = ()
    selection: SelectionRecord | None = None

    @property
    def tokens(self) -> int:
        """Read until the last step, those read twice counted twice."""
        return self.curve[-1].step * self.tokens_a_step


class Graft(_Record):
    """Neurons of a dropped MLP (``source``), or KV groups of a dropped attention, that took the place of as many of one
    that stays (``into``)."""

    into: str
    source: str
    neurons: int
    groups: int = 0


COMPLEXITY = "feature complexity"
"""What an inspection calls the share of the neurons of an MLP that is left when those that compute nearly the same are
merged."""

_TOGETHER = ("average", "fuse", "flatten", "gains", "second-order", "merge")
_TRAINED = ("sparse-training", "group-sparse", "nested-ranks")
_ACTS = (*_TOGETHER, *_TRAINED)


class HealStep(_Record):
    """One way to new weights, as it was asked for: on which text, trained on how many tokens (None where that is not
    asked), selected by which word (and ``:`` its target). ``counted``: whether the budget of the cut counts what it
    adds, which it does where both are made at once."""

    method: str
    text: str
    seed: int
    tokens: int | None = None
    select: str = ""
    counted: bool = False

    @property
    def combined(self) -> bool:
        """Whether the new weights are the act of the recipe itself, which no option asks for."""
        return self.method in _ACTS

    @property
    def read(self) -> tuple[str, ...]:
        """The texts that it looked at."""
        target = self.select.partition(":")[2]
        return (self.text, target) if target else (self.text,)


class HealRecord(_Record):
    """How what was left after the cut got new weights: ``left_alone`` names the write linears that were not tried,
    with the reason; ``work`` counts block-token forwards; ``unhealed`` is the evidence of the cut alone.
    ``divergence`` is how far the cut and the healed model are from the dense one on windows that no fit saw;
    ``refused``: the healed one was no nearer, so the model is left as cut. ``training`` came after the refits, if any.
    ``paths``: the ranks of those that stand beside linears, by the path of the linear; ``bridges``: of those behind
    blocks, by the path of the block in the original model.
    ``steps``: all that was done one after the other, at least one; the rest is said of the last. ``in_vain``: what was
    tried later and brought the model no nearer, so nothing of it is left."""

    tokens: int
    work: int
    refits: tuple[Refit, ...]
    left_alone: dict[str, str] = {}
    grafts: tuple[Graft, ...] = ()
    paths: dict[str, int] = {}
    bridges: dict[str, int] = {}
    divergence: tuple[float | None, float | None] | None = None  # null in JSON where not finite
    refused: bool = False
    steps: tuple[HealStep, ...]
    in_vain: tuple[HealStep, ...] = ()
    unhealed: tuple[TextEvidence, ...] = ()
    training: TrainingRecord | None = None

    @property
    def method(self) -> str:
        """The way to the new weights: that of the last step."""
        return self.steps[-1].method

    @property
    def combined(self) -> bool:
        """Whether the new weights are the act of the recipe itself, which no option asks for."""
        return self.steps[-1].combined


class Returned(_Record):
    """A model taken part of the way back to the ``base`` that it was trained from: of what that training changed in
    each block (by address), the ``kept`` share. ``validity`` and ``diversity`` before and after: of answers that are to
    be one random character, where the choice went by them (see ``measure.characters``)."""

    base: str
    kept: dict[str, float]
    validity: tuple[float, float] | None = None
    diversity: tuple[float, float] | None = None


class Measures(_Record):
    """What was measured of the dense model: for each score, unit address -> importance (high is important), and the
    angular distance between the inputs of block i and of block i + n, ``angular[stack][n - 1][i]`` (ragged)."""

    scores: dict[str, dict[str, float]] = {}
    angular: dict[str, list[list[float]]] = {}
    calibration: str = ""
    tokens: int = 0


class Quantity(_Record):
    """A cost before and after, in ``unit`` (parameters, bytes, FLOPs, bytes per token, blocks)."""

    unit: str
    dense: float
    compressed: float


class Run(_Record):
    """Everything a run asked for, got and measured."""

    schema_version: Literal[1] = 1
    model: str
    outline: Outline
    plan: Plan
    asked: str | None = None
    realised: dict[str, float] = {}
    costs: dict[str, Quantity] = {}
    search: SearchRecord | None = None
    measures: Measures | None = None
    audits: dict[str, StackAudit] = {}
    healing: HealRecord | None = None
    returned: Returned | None = None
    evidence: tuple[TextEvidence, ...] = ()
    probes: tuple[ProbeEvidence, ...] = ()
    generations: tuple[Generation, ...] = ()
    timings: tuple[Timing, ...] = ()
    seconds: dict[str, float] = {}
    environment: dict[str, str] = {}
