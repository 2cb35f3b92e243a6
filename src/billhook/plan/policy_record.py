"""What a run-time policy saves and what it costs, as data."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from billhook.plan.record import TextEvidence, Timing


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Savings(_Record):
    """Work a generated token, with the policy and without, counted on the text that quality was taken on.

    ``blocks``: executions, a block that is left out in part counting by its parameters. ``flops``: as fraction of the
    plain model's, by the cost model, head included; an attention that only makes its keys and values is charged for
    these and for its mixing. ``kv_bytes``: cache a token, as fraction. ``sublayers``: executions a token of each one
    that did not simply run once.
    """

    blocks: float
    blocks_plain: int
    flops: float
    kv_bytes: float
    sublayers: dict[str, float]


class PolicyReport(_Record):
    """One policy on one model: parameters, work saved, measured time, quality on text that nothing was tuned on."""

    model: str
    policy: str
    parameters: dict[str, object]
    kv: str
    savings: Savings
    evidence: tuple[TextEvidence, ...]
    timings: tuple[Timing, ...] = ()
    environment: dict[str, str] = {}
