"""A policy's dial turned to an amount of work or of cache."""

from __future__ import annotations

from collections.abc import Callable

from billhook.plan.errors import InputError
from billhook.runtime.policy import Policy

STEPS = 9


def turned_to(policy: Policy, share: float, cost_of: Callable[[Policy], float], kind: str = "flops") -> Policy:
    """The setting nearest to leaving out nothing whose generated tokens cost at most ``share`` of the plain model's.

    ``cost_of`` gives the share that a setting costs, of the ``kind`` that an error names; where it raises InputError
    the model cannot be run like that and the dial goes too far. Bisection, ``STEPS`` times; of the settings tried that
    are cheap enough the dearest one is taken. InputError for a policy without a dial, and where no setting that was
    tried is cheap enough.
    """
    if policy.dial is None:
        raise InputError(f"policy {policy.name} has no dial to turn")
    _, low, high = policy.dial
    found: dict[float, tuple[float, Policy]] = {}

    def enough(value: float) -> bool:
        setting = policy.turned(*[value] * len(policy.dials))
        try:
            cost = cost_of(setting)
        except InputError:
            return True
        if cost <= share:
            found[value] = cost, setting
        return cost <= share

    if enough(high):
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (low, middle) if enough(middle) else (middle, high)
    if not found:
        raise InputError(f"policy {policy.name} never costs as little as {share:.0%} of a token's {kind} here")
    return max(found.values(), key=lambda pair: pair[0])[1]
