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
    these and for its mixing. What a policy computes to decide or to correct is not in them; measured times hold it.
    ``kv_bytes``: cache a token, as fraction. ``sublayers``: executions a token of those that did not simply run once.
    """

    blocks: float
    blocks_plain: int
    flops: float
    kv_bytes: float
    sublayers: dict[str, float]


class Drafting(_Record):
    """How self-speculation went, over one or more generations.

    ``acceptance``: share of the drafted tokens that were accepted; ``tokens_per_verify``: tokens a pass of the whole
    model over a draft gave; both None where nothing was drafted. ``same_text``: share of the texts that are the plain
    model's token for token, None where those were not written.
    """

    drafted: int
    accepted: int
    acceptance: float | None
    tokens_per_verify: float | None
    same_text: float | None = None

    def __str__(self) -> str:
        if self.acceptance is None:
            return "nothing was drafted"
        return (
            f"{self.accepted} of {self.drafted} drafted tokens accepted ({self.acceptance:.1%}), "
            f"{self.tokens_per_verify:.2f} tokens a verification"
        )


class PolicyReport(_Record):
    """One policy on one model: parameters, work saved, measured time, quality on text that nothing was tuned on.

    A policy that leaves the text as it is has ``drafting`` in place of savings and evidence.
    """

    model: str
    policy: str
    parameters: dict[str, object]
    kv: str
    savings: Savings | None = None
    evidence: tuple[TextEvidence, ...] = ()
    drafting: Drafting | None = None
    timings: tuple[Timing, ...] = ()
    environment: dict[str, str] = {}
