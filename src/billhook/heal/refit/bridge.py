"""A map of low rank that stands for blocks that are gone, behind the block before them."""

from __future__ import annotations

from collections.abc import Set

from torch import Tensor

from billhook.anatomy.types import Stack
from billhook.heal.refit.peers import Peers
from billhook.heal.refit.places import Place
from billhook.heal.refit.ridge import PENALTIES, Moments
from billhook.measure.spectrum import spectrum
from billhook.plan.address import Address
from billhook.plan.record import Refit

SHARE = 8  # the rank is this part of the stream's width: both factors have 1/4 of its square, about 2% of a block


def before_gaps(stack: Stack, places: list[Place], drops: Set[Address]) -> frozenset[Place]:
    """The last place that acts in each block that whole blocks are gone after."""
    whole = [block.address in drops for block in stack.blocks]
    last = {place.number: place for place in places if place.acts(drops)}
    return frozenset(place for number, place in last.items() if [*whole, False][number + 1])


def fitted(name: str, fit: Moments, held: Moments, peers: Peers) -> tuple[tuple[Tensor, Tensor] | None, Refit]:
    """A [rank, hidden] and B [hidden, rank], float32, for which the stream h + B A h lacks least of what it should be
    (moments of h against what it lacks), and what is on record of them under ``name``; none where that is no less on
    what is held back.

    The ridge solution D is taken for its first directions, as far as they reach what it puts out: with U the leading
    eigenvectors of D C D', C the moments of h, B A = U U'D is the nearest to D on those inputs (reduced-rank
    regression: Izenman 1975).
    """
    solution = peers.solved(fit, held, PENALTIES[0])

    def directions() -> Tensor | None:
        assert solution is not None
        basis = spectrum(solution.change.T, fit.inputs, max(1, len(fit.inputs) // SHARE)).basis.to(fit.inputs.device)
        return basis if held.error(solution.change @ basis @ basis.T) < held.energy else None

    b = None if solution is None else peers.first(directions)
    before = held.energy / held.tokens
    if solution is None or b is None:
        return None, Refit(weight=name, before=before, after=before, penalty=None)
    after = held.error(solution.change @ b @ b.T) / held.tokens
    return (b.T @ solution.change.T, b), Refit(weight=name, before=before, after=after, penalty=solution.penalty)
