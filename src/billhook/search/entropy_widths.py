"""The width of each MLP by a binary search on the entropy of the model's own prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Keep
from billhook.search.width import Space, order_of


def entropy_widths(
    spaces: tuple[Space, ...],
    scores: Mapping[Address, Tensor],
    entropy: Callable[[tuple[Keep, ...]], float],
    tolerance: float,
) -> tuple[Keep, ...]:
    """Of each sublayer in turn, from front to back, as many of the least important units go as the mean entropy of the
    model's prediction allows: it may change by at most ``tolerance`` nats from what it was when the sublayer's turn
    came, the sublayers before it as narrow as found. ``entropy`` runs the model with some keeps.

    Source: AMP (arXiv 2603.08100): no ratio is set beforehand. The measure of the change and the order of the MLPs are
    not in its abstract. Cost: log2 of the number of units passes for each sublayer.
    """
    if tolerance < 0:
        raise InputError(f"a tolerance of {tolerance} is below 0")
    found: tuple[Keep, ...] = ()
    for space in spaces:
        before = entropy(found)
        order = order_of(scores[space.address], space.parts)

        def keep(step: int, space: Space = space, order: Tensor = order) -> tuple[Keep, ...]:
            kept = order[space.count - space.left[step] :].sort().values
            return (Keep(unit=space.address, inner=space.kind, indices=tuple(kept.tolist())),) if step else ()

        low, high = 0, len(space.left) - 1  # steps that are known to be allowed; that may be
        while low < high:
            middle = (low + high + 1) // 2
            allowed = abs(entropy((*found, *keep(middle))) - before) <= tolerance
            low, high = (middle, high) if allowed else (low, middle - 1)
        found = (*found, *keep(low))
    return found
