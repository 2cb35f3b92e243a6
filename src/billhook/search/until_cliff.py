"""No budget: cut until the next step costs out of proportion."""

from __future__ import annotations

import math
from collections.abc import Mapping

from billhook.plan.address import Address
from billhook.plan.check import normalise
from billhook.plan.errors import InputError
from billhook.search.cliff import LEAST, cliff
from billhook.search.descend import descend
from billhook.search.ledger import Memo
from billhook.search.objective import Progress
from billhook.search.one_shot import Per, lowest, ranking
from billhook.search.path import Found, Path
from billhook.search.problem import Problem


def greedy_until_cliff(
    problem: Problem,
    memo: Memo[Address],
    *,
    lazy: bool = True,
    per: Per = "budget",
    estimates: Mapping[Address, float] | None = None,
    progress: Progress | None = None,
) -> Found:
    """The path of ``greedy`` up to its cliff (see ``search.cliff``), the step over it being the last on record.

    A model that every further unit would break has its cliff there. Nothing is put back or exchanged afterwards.
    ``problem`` is posed with the budget ``until=cliff``. Cost: that of a greedy search to one step beyond what is
    dropped. Raises InputError where no step stands out: there is no telling then how much is too much.
    """
    path, rises = Path(problem), dict(estimates or {})
    descend(path, memo, rises, lazy=lazy, per=per, until=lambda: cliff(path.steps) is not None, progress=progress)
    edge = cliff(path.steps)
    if edge is None and not path.met and path.open():
        edge = len(path.steps)
    return _cut_back(path, edge, memo.work, memo.evaluations, progress)


def ranked_until_cliff(
    problem: Problem,
    scores: Mapping[Address, float],
    memo: Memo[Address],
    *,
    per: Per = "unit",
    work: int = 0,
    progress: Progress | None = None,
) -> Found:
    """The order of ``one_shot`` up to the cliff of the objective along it, or to the unit that breaks the model; the
    score of a step on record is its rise.

    Cost: besides the ``work`` of the scores one evaluation of the objective a step. Otherwise as the greedy one.
    """
    path = Path(problem)
    rank = ranking(path, scores, per)
    while cliff(path.steps) is None and (unit := lowest(path, rank)) is not None:
        before, after = memo.at(path.drops), memo.at(path.drops | {unit}, path.drops)
        if after == math.inf:
            return _cut_back(path, len(path.steps), work + memo.work, memo.evaluations, progress)
        path.step([unit], score=after - before, objective=after, work=work + memo.work)
        if progress is not None:
            progress("search", round(1000 * path.progress), 1000)
    return _cut_back(path, cliff(path.steps), work + memo.work, memo.evaluations, progress)


def _cut_back(path: Path, edge: int | None, work: int, evaluations: int, progress: Progress | None) -> Found:
    if edge == 0:
        raise InputError(f"budget {path.problem.budget}: the first step breaks the model already, so nothing may go")
    if edge is None:
        raise InputError(
            f"budget {path.problem.budget}: of the {len(path.steps)} possible steps none after the first {LEAST} costs "
            f"out of proportion to those before it, so there is no cliff to stop at; give an amount, such as params=0.8"
        )
    if progress is not None:
        progress("search", 1000, 1000)
    drops = [Address.parse(unit) for step in path.steps[:edge] for unit in step.units]
    return Found(normalise(drops, path.problem.outline), tuple(path.steps), work, evaluations)
