"""From the words of a recipe to the linears that become two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from billhook.anatomy.low_rank import as_kept
from billhook.data import Windows
from billhook.heal import Healing
from billhook.measure.batches import batches_of
from billhook.plan.budget import realised
from billhook.plan.plan import Factorise
from billhook.plan.record import SearchRecord, Step
from billhook.recipes.choices import Ranks
from billhook.recipes.once import Once
from billhook.recipes.opened import Opened
from billhook.recipes.schema import Recipe
from billhook.search.bases import Linear, bases
from billhook.search.nested import Factors, nested
from billhook.search.ranks import RankProblem, spread

Progress = Callable[[str, int, int], None]
Bases = dict[Factorise, NDArray[Any]]


def take_apart(
    recipe: Recipe,
    model: Opened,
    problem: RankProblem,
    windows: Windows,
    once: Once,
    *,
    seed: int,
    progress: Progress | None,
) -> tuple[Bases, SearchRecord, dict[str, dict[str, float]], Healing | None]:
    """Carry out the choice of a recipe of ranks: the basis of each linear that becomes two, its record, for each
    sublayer how hard its linears are to take apart, and the weights that were learned along. Bases that ``once`` knows
    already cost nothing."""
    choice = recipe.choice
    assert isinstance(choice, Ranks)
    blocks = len(model.anatomy.stack("decoder").blocks)
    one = 0 if choice.inputs == "none" else windows.tokens * blocks
    found, work = once(
        "bases", lambda: (bases(model.model, model.anatomy, windows, choice.inputs, progress=progress), one)
    )
    energies = {linear: (s.energies, s.total) for linear, s in found.items()}
    ranks = spread(problem, energies, choice.allocation)
    learned: dict[Linear, Factors] = {}
    if choice.steps is not None:
        batches = list(batches_of(windows, model.model, tokens_at_once=1))
        learned = nested(
            model.model, model.anatomy, found, ranks, batches, steps=choice.steps, seed=seed, progress=progress
        )
        means = {linear: factors.energies * windows.tokens for linear, factors in learned.items()}
        energies |= {linear: (mean, max(found[linear].total, mean.sum().item())) for linear, mean in means.items()}
        ranks = spread(problem, energies, choice.allocation)
        work += 4 * choice.steps * windows.ids.shape[1] * blocks

    def basis(linear: Linear, rank: int) -> Tensor:
        return learned[linear].basis(rank) if linear in learned else found[linear].basis[:, :rank]

    edits = {
        Factorise(unit=unit, linear=path, rank=rank): basis((unit, path), rank).contiguous().numpy()
        for (unit, path), rank in sorted(ranks.items())
    }
    healing = _healing(model, learned, ranks, windows) if learned else None
    units = tuple(str(unit) for unit in dict.fromkeys(edit.unit for edit in edits))
    costs = realised(problem.costs(ranks), problem.dense)
    step = Step(units=units, score=None, objective=None, realised=costs, work=work)
    record = SearchRecord(recipe=recipe.name, objective="energy of outputs", steps=(step,), work=work, evaluations=0)
    lost: dict[str, list[float]] = {}
    for (unit, _), spectrum in sorted(found.items()):
        kept = spectrum.energies[: max(len(spectrum.energies) // 2, 1)].sum().item() / max(spectrum.total, 1e-30)
        lost.setdefault(str(unit), []).append(1 - kept)
    importance = {unit: sum(shares) / len(shares) for unit, shares in lost.items()}
    return edits, record, {"energy of its outputs lost with half the parameters": importance}, healing


def _healing(
    model: Opened, learned: Mapping[Linear, Factors], ranks: Mapping[Linear, int], windows: Windows
) -> Healing:
    """What the linears that become two have learned to compute, as weights of the original model."""
    tensors = {}
    for (unit, path), factors in learned.items():
        if (unit, path) in ranks:
            name = f"{model.anatomy.block(unit.parent).path}.{path}"
            linear: Any = model.model.get_submodule(name)
            weight = factors.weight(ranks[unit, path]).to(linear.weight)
            tensors[f"{name}.weight"] = as_kept(linear, weight)
    return Healing(tensors, (), {}, windows.tokens, 0)
