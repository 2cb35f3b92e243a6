"""From the words of a recipe to the linears that become two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from billhook.data import Windows
from billhook.plan.budget import realised
from billhook.plan.plan import Factorise
from billhook.plan.record import SearchRecord, Step
from billhook.recipes.opened import Opened
from billhook.recipes.schema import Ranks, Recipe
from billhook.search.bases import bases
from billhook.search.ranks import RankProblem, spread

Progress = Callable[[str, int, int], None]
Bases = dict[Factorise, NDArray[Any]]


def take_apart(
    recipe: Recipe, model: Opened, problem: RankProblem, windows: Windows, *, progress: Progress | None
) -> tuple[Bases, SearchRecord, dict[str, dict[str, float]]]:
    """Carry out the choice of a recipe of ranks: the basis of each linear that becomes two, its record, and for each
    sublayer how hard its linears are to take apart."""
    choice = recipe.choice
    assert isinstance(choice, Ranks)
    found = bases(model.model, model.anatomy, windows, choice.inputs, progress=progress)
    ranks = spread(problem, {linear: (s.energies, s.total) for linear, s in found.items()}, choice.allocation)
    edits = {
        Factorise(unit=unit, linear=path, rank=rank): found[unit, path].basis[:, :rank].contiguous().numpy()
        for (unit, path), rank in sorted(ranks.items())
    }
    work = 0 if choice.inputs == "none" else windows.tokens * len(model.anatomy.stack("decoder").blocks)
    units = tuple(str(unit) for unit in dict.fromkeys(edit.unit for edit in edits))
    costs = realised(problem.costs(ranks), problem.dense)
    step = Step(units=units, score=None, objective=None, realised=costs, work=work)
    record = SearchRecord(recipe=recipe.name, objective="energy of outputs", steps=(step,), work=work, evaluations=0)
    lost: dict[str, list[float]] = {}
    for (unit, _), spectrum in sorted(found.items()):
        kept = spectrum.energies[: max(len(spectrum.energies) // 2, 1)].sum().item() / max(spectrum.total, 1e-30)
        lost.setdefault(str(unit), []).append(1 - kept)
    importance = {unit: sum(shares) / len(shares) for unit, shares in lost.items()}
    return edits, record, {"energy of its outputs lost with half the parameters": importance}
