"""Where a path of a search stops being cheap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from statistics import median

from billhook.plan.record import Step

KIND = "params"
FREE = 0.5
FACTOR = 3.0
LEAST = 3


def cliff(steps: Sequence[Step]) -> int | None:
    """The number of the first step that costs out of proportion to those before it; None if there is none.

    The rate of a step is the rise of the objective for what it frees of the block parameters, as a fraction of dense.
    Its growth is that rate over the highest rate of any step before. A step is the cliff if its growth is above
    ``FACTOR`` times the usual growth, the median over the steps before, but at least 1. So a path whose rates double
    with every step has none, however high it gets, and one that was flat has one where they go up threefold at once.

    The objective is in nats a token. Rates below ``FREE`` (half a nat for all of the blocks, 0.005 for a hundredth)
    count as that much: jumps among steps that cost next to nothing are no cliff. The first ``LEAST`` steps are only
    looked at to know what is usual. Steps that free no parameters, or whose objective was not measured, are passed
    over.

    A rule of this project; the drop it is meant for is described in "What Matters in Transformers?" (arXiv 2406.15786).
    """
    measured = [(number, max(rate, FREE)) for number, rate in _rates(steps)]
    highest = list(accumulate((rate for _, rate in measured), max))
    growths = [rate / high for (_, rate), high in zip(measured[1:], highest, strict=False)]
    for place in range(LEAST - 1, len(growths)):
        if growths[place] > FACTOR * max(1.0, median(growths[:place])):
            return measured[place + 1][0]
    return None


def _rates(steps: Sequence[Step]) -> Iterator[tuple[int, float]]:
    """The number and the rate of each step that only drops, where both ends of it are measured."""
    if not steps:
        return
    first = steps[0]
    if first.objective is not None and first.score is not None and first.units:
        yield from _rate(0, first.objective - first.score, 1.0, first)
    for number, (before, after) in enumerate(pairwise(steps), start=1):
        if before.objective is not None:
            yield from _rate(number, before.objective, before.realised[KIND], after)


def _rate(number: int, objective: float, kept: float, step: Step) -> Iterator[tuple[int, float]]:
    freed = kept - step.realised[KIND]
    if step.objective is not None and freed > 0:
        yield number, (step.objective - objective) / freed
