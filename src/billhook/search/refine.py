"""Second thoughts: exchange what a greedy search took too early."""

from __future__ import annotations

from collections.abc import Callable

from billhook.plan.address import Address
from billhook.search.descend import descend, put_back
from billhook.search.ledger import Memo
from billhook.search.objective import Progress
from billhook.search.path import Path


def refine(
    path: Path, memo: Memo[Address], rises: dict[Address, float], *, work: int, progress: Progress | None = None
) -> None:
    """Local search around a solution, in place: put one dropped unit back, meet the budget anew by lazy greedy without
    it, and keep the result if the objective is lower than before. Ends when no exchange of one unit helps, or before
    the next one when ``work`` block-token forwards have been spent.

    Units are tried in order of relief: by how much the objective falls when the unit comes back, for what that takes
    from the budget. The unit that greedy took first, when little else was gone, often turns out the dearest. Old rises
    are lower bounds here too, so an exchange is given up as soon as its bound is not below what there is.
    """
    start = memo.work

    def spent() -> bool:
        if progress is not None:
            progress("second thoughts", min(memo.work - start, work), work)
        return memo.work - start >= work

    while _exchange(path, memo, rises, spent):
        pass
    if progress is not None:
        progress("second thoughts", work, work)


def _exchange(path: Path, memo: Memo[Address], rises: dict[Address, float], spent: Callable[[], bool]) -> bool:
    """Make the first exchange that helps. False if there is none, or none was found before the work was ``spent``."""
    best = memo.at(path.drops)
    relief = {}
    # From the deepest up: each of these states then shares the longest prefix with the one before.
    for unit in sorted(path.drops, key=lambda u: (-u.block, u)):
        if spent():
            return False
        share = path.problem.missing(path.problem.costs.of(path.drops - {unit}))
        relief[unit] = (best - memo.at(path.drops - {unit})) / max(share, 1e-9)
    for unit in sorted(relief, key=lambda u: (-relief[u], u)):
        if spent():
            return False
        trial = Path(path.problem, path.drops - {unit})
        known = dict(rises)
        descend(trial, memo, known, barred=unit, below=best)
        if trial.met:
            put_back(trial, memo)
        if trial.met and memo.at(trial.drops) < best:
            rises.update(known)
            gone, back = trial.drops - path.drops, path.drops - trial.drops
            path.step(gone, back, objective=memo.at(trial.drops), work=memo.work)
            return True
    return False
