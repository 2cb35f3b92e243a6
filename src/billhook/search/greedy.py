"""One unit after another, each time the one whose loss hurts least."""

from __future__ import annotations

from collections.abc import Mapping

from billhook.plan.address import Address
from billhook.search.descend import descend, put_back
from billhook.search.ledger import Memo
from billhook.search.objective import Progress
from billhook.search.one_shot import Per
from billhook.search.path import Found, Path
from billhook.search.problem import Problem
from billhook.search.refine import refine as refined


def greedy(
    problem: Problem,
    memo: Memo[Address],
    *,
    lazy: bool = True,
    per: Per = "budget",
    refine: float = 0.0,
    estimates: Mapping[Address, float] | None = None,
    progress: Progress | None = None,
) -> Found:
    """Drop the unit with the lowest rise of the objective for what it gains of the budget (or simply the lowest rise,
    ``per`` unit), until the budget is met; then put back what is not needed any more, as long as that helps. With
    ``refine``, exchange units afterwards, for at most that many times the work spent until then.

    Plain greedy evaluates every candidate anew after every removal (SLEB, Song et al. 2024, does so for blocks). Lazy
    greedy takes the rise measured earlier for a lower bound and evaluates a candidate only when it comes out on top
    (Minoux 1978; CELF, Leskovec et al. 2007, section 3.2): exact where a unit never gets less important as others go,
    and close where it hardly does.

    ``estimates`` are first figures for the rise of each unit, from a cheaper objective (fewer tokens, say); lazy greedy
    takes them for the old ones. Their work is the caller's to count.
    """
    path = Path(problem)
    rises = dict(estimates or {})
    descend(path, memo, rises, lazy=lazy, per=per, progress=progress)
    put_back(path, memo)
    if refine > 0:
        refined(path, memo, rises, work=round(refine * memo.work), progress=progress)
    return path.found(memo.work, memo.evaluations)
