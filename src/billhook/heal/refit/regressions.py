"""The regressions of a walk: of the windows to fit on as of those held back, and what came of each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from billhook.heal.refit.peers import Peers
from billhook.heal.refit.ridge import PENALTIES, Moments, Solution
from billhook.heal.refit.stepping import Batches
from billhook.plan.record import Refit

_SMALLEST = 1e-12  # energy of a token, against division by zero


class Regressions:
    """Over the tokens of some batches, of whose rows these are ``held`` back (bool [rows] a batch), and of those of all
    peers. ``refits`` is what is on record of them."""

    def __init__(self, batches: Batches, held: list[Tensor], peers: Peers) -> None:
        self.refits: list[Refit] = []
        self._batches, self._held, self._peers = batches, held, peers
        self._near: dict[torch.Size, float] = {}  # the penalty that did best for the last regression of that shape

    def solve(
        self,
        names: list[str],
        h: list[Tensor],
        r: list[Tensor],
        dense: list[Tensor],
        within: Callable[[Tensor], Tensor] | None = None,
        sums: type[Moments] = Moments,
    ) -> Solution | None:
        """Guess r from h, both for each batch, with a small error relative to ``dense``; what came of it goes on record
        under these names. The guess is linear in r, so where changes must lie ``within`` a space, r may be put there
        first."""
        fit, held = self.moments(h, r, dense, sums)
        if within is not None:
            fit.cross = within(fit.cross)
        shape = fit.cross.shape
        solution = self._peers.solved(fit, held, self._near.get(shape, PENALTIES[0]))
        if solution is not None:
            self._near[shape] = solution.penalty
        before = held.energy / held.tokens
        after, penalty = (before, None) if solution is None else (solution.error / held.tokens, solution.penalty)
        self.refits += [Refit(weight=name, before=before, after=after, penalty=penalty) for name in names]
        return solution

    def moments(
        self, h: list[Tensor], r: list[Tensor], dense: list[Tensor], sums: type[Moments] = Moments
    ) -> tuple[Moments, Moments]:
        """Of the windows to fit on, and of those held back, of all processes."""
        fit, held = sums(), sums()
        for i, (inputs, lacks, goal) in enumerate(zip(h, r, dense, strict=True)):
            real = self._batches.real(i, lacks)
            back = self._held[i].to(real.device)[:, None]
            for moments, chosen in ((fit, real & ~back), (held, real & back)):
                energy = goal[chosen].float().square().sum(-1)
                rows = inputs.reshape(*real.shape, -1)[chosen]
                moments.add(rows, lacks[chosen], 1 / energy.clamp(min=_SMALLEST))
        return self._peers.summed(fit), self._peers.summed(held)
