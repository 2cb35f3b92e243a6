"""The most sparing setting of a policy that keeps a quality target."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from billhook.evaluate.frontier import frontier
from billhook.plan.errors import InputError
from billhook.plan.record import TextEvidence
from billhook.runtime.policy import Policy

STEPS = 9
_FORM = re.compile(r"(kl|top1|perplexity)(<=|>=)(\d*\.?\d+)")
_SIGN = {"kl": "<=", "top1": ">=", "perplexity": "<="}


@dataclass(frozen=True)
class Goal:
    """A bound on one figure: ``kl`` in nats a token from the plain model, ``top1`` share of equal predictions, or
    ``perplexity`` as ratio to the plain model's."""

    figure: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Goal:
        """Read ``kl<=0.05``, ``top1>=0.95`` or ``perplexity<=1.1``; InputError for anything else, and for a bound that
        the plain model itself misses."""
        found = _FORM.fullmatch(text.replace(" ", ""))
        if not found or _SIGN[found[1]] != found[2]:
            raise InputError(f"target {text!r} is not of the form kl<=0.05, top1>=0.95 or perplexity<=1.1")
        figure, bound = found[1], float(found[3])
        if (figure == "top1" and bound > 1) or (figure == "perplexity" and bound < 1):
            raise InputError(f"target {text!r} is more than the plain model keeps, for which {figure} is 1")
        return cls(figure, bound)

    def of(self, evidence: TextEvidence) -> float:
        figures = {"kl": evidence.kl, "top1": evidence.top1, "perplexity": evidence.perplexity_ratio}
        return figures[self.figure].value

    def met(self, evidence: TextEvidence) -> bool:
        value = self.of(evidence)
        return value >= self.bound if self.figure == "top1" else value <= self.bound

    def __str__(self) -> str:
        return f"{self.figure}{_SIGN[self.figure]}{self.bound:g}"


@dataclass(frozen=True)
class Tried:
    """One setting of the dial, of both where there are two, what it gave and what it costs (see ``Policy.spares``)."""

    value: float
    second: float | None
    figure: float
    cost: float
    met: bool


def tune(
    policy: Policy, judge: Callable[[Policy], tuple[TextEvidence, float]], goal: Goal
) -> tuple[Policy, list[Tried]]:
    """Bisect the policy's dial between leaving out nothing and all that may be, ``STEPS`` times; two dials are turned
    along the edge of what the goal allows (see ``frontier``).

    ``judge`` gives the evidence and the cost of a policy. The answer is the setting that costs least among those tried
    that meet the goal, so it meets it even where quality does not fall evenly along the dial. InputError for a
    policy without a dial, and where not even its quiet end meets the goal.
    """
    if not policy.dials:
        raise InputError(f"policy {policy.name} has no threshold to tune")
    quiet = tuple(dial[1] for dial in policy.dials)
    loud = tuple(dial[2] for dial in policy.dials)
    found: dict[str, Tried] = {}
    settings: dict[str, Policy] = {}

    def meets(*values: float) -> bool:
        setting = policy.turned(*values)
        key = setting.model_dump_json()
        if key not in found:
            try:
                evidence, cost = judge(setting)
            except InputError:
                if values == quiet:
                    raise
                return False  # the model cannot be run like that: the dial goes too far
            second = values[1] if len(values) > 1 else None
            found[key] = Tried(values[0], second, goal.of(evidence), cost, goal.met(evidence))
            settings[key] = setting
        return found[key].met

    if not meets(*quiet):
        raise InputError(f"policy {policy.name} misses {goal} even where it leaves out nothing")
    if not meets(*loud):
        if len(quiet) == 2:
            for _ in frontier(meets, (quiet[0], loud[0]), (quiet[1], loud[1])):
                pass
        else:
            low, high = quiet[0], loud[0]
            for _ in range(STEPS):
                middle = (low + high) / 2
                low, high = (middle, high) if meets(middle) else (low, middle)
    good = (key for key, tried in found.items() if tried.met)
    best = min(good, key=lambda key: (found[key].cost, abs(found[key].value - quiet[0])))
    return settings[best], list(found.values())
