"""Inner units that are driven to zero while the weights train, after their candidacy was checked in cycles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.anatomy import Inner
from billhook.measure.cost import Costs
from billhook.plan.address import Address
from billhook.plan.plan import Keep
from billhook.plan.record import Look
from billhook.search.adam import Adam
from billhook.search.exchanged import Exchanged
from billhook.search.width import WidthProblem, allocate

Progress = Callable[[str, int, int], None]
RATE = 1e-4
SAMPLES = 4  # steps of a cycle
SHRINK = 0.5  # share of the training in which what goes is driven to zero
LOOKS = 6  # at held-back text afterwards
_SAFE = 1e-8


@dataclass(frozen=True)
class GroupSparse:
    """``keeps`` of the sublayers that get narrower, and what that costs; ``scores`` of all units, the mean over the
    cycles; ``weights`` the new ones by name, in the dtype and the shape of the model's, none where those that it began
    with did as well on held-back text. ``cycles``: how many it took."""

    keeps: tuple[Keep, ...]
    costs: Costs
    scores: dict[Address, Tensor]
    weights: dict[str, Tensor]
    cycles: int
    looks: tuple[Look, ...]


def names_of(units: Mapping[Address, Inner], parameters: Mapping[str, Tensor]) -> list[str]:
    """Every parameter that holds a part of one of the units."""
    found = dict.fromkeys(piece.parameter for inner in units.values() for piece in inner.slices)
    return [name for name in found if name in parameters]


def group_sparse(
    held: Exchanged,
    problem: WidthProblem,
    units: Mapping[Address, Inner],
    *,
    steps: int,
    cycles: int,
    progress: Progress | None = None,
) -> GroupSparse:
    """Find the units that may go while all that hold units train, drive them to zero and train on without them.

    A unit's score is the mean of five figures of its weights w and of the step g that Adam is about to take (over all
    tensors in which it has a part), each divided by its norm over all units: |w|, |w| by the number of weights,
    1 + the cosine of w and g, |w'g|, and |w'g|^2 / 2. Candidates are those of lowest score that would meet the budget.
    A cycle trains for ``SAMPLES`` steps while its candidates shrink to zero, and looks at all scores before every step;
    then the weights are put back, and what had become a candidate meanwhile, and was in no cycle before, is shrunk in
    the next: one that the model cannot do without is seen by its slopes as it goes. With no more candidates, or after
    ``cycles``, those of lowest mean score go: over the first half of ``steps`` they shrink to zero, by equal parts,
    and then the rest trains without them. The state that does best on held-back text wins, once they are gone; the
    weights as they were, without the units, are the first of them.

    Source: HESSO and its corrective cycles (arXiv 2409.09085), and its authors' code (microsoft/only_train_once): the
    five figures, their weights, how candidates are sampled. There a look at the loss of each group of units cut to
    three sparsities adds to the score, which takes six passes a sublayer; it is left out. Memory: three float32 copies
    of what is trained. Cost: each step a pass, a backward pass and where the goal is ``kl`` a pass of the dense model.
    """
    state = _Training(held, units)
    seen: list[dict[Address, Tensor]] = []
    once: set[tuple[Address, int]] = set()
    candidates: set[tuple[Address, int]] = set()
    total, row = cycles * SAMPLES + steps, 0
    taken = 0
    with held.opened():
        for cycle in range(cycles):
            state.reset()
            meanwhile: set[tuple[Address, int]] = set()
            for step in range(SAMPLES):
                scores = state.scored(row)
                seen.append(scores)
                lowest = _gone(problem, allocate(problem, scores)[0])
                if cycle == 0 and step == 0:
                    candidates = lowest
                    once |= candidates
                meanwhile |= lowest - once
                state.step(candidates, (SAMPLES - step - 1) / (SAMPLES - step))
                row += 1
                if progress is not None:
                    progress("group sparsity", row, total)
            taken = cycle + 1
            candidates = meanwhile
            once |= candidates
            if not candidates:
                break
        means = {a: torch.stack([one[a] for one in seen]).mean(0) for a in seen[0]}
        keeps, costs = allocate(problem, means)
        gone = _gone(problem, keeps)
        state.reset()
        shrinking = max(1, round(SHRINK * steps))
        every = max(1, -(-(steps - shrinking) // LOOKS))
        looks = [Look(step=0, loss=None, held=held.held_loss(state.without(gone)))]
        best: dict[str, Tensor] = {}
        losses: list[float] = []
        for step in range(steps):
            left = shrinking - step
            state.scored(row + step)
            losses.append(state.loss)
            state.step(gone, (left - 1) / left if left > 0 else 0.0)
            if step + 1 == steps or (left <= 1 and (step + 1 - shrinking) % every == 0):
                now = state.without(gone)
                look = Look(step=step + 1, loss=sum(losses) / len(losses), held=held.held_loss(now))
                best = now if look.held < min(one.held for one in looks) else best
                looks.append(look)
                losses = []
            if progress is not None:
                progress("group sparsity", cycles * SAMPLES + step + 1, total)
    return GroupSparse(keeps, costs, means, best, taken, tuple(looks))


def _gone(problem: WidthProblem, keeps: tuple[Keep, ...]) -> set[tuple[Address, int]]:
    counts = {space.address: space.count for space in problem.spaces}
    return {(keep.unit, u) for keep in keeps for u in set(range(counts[keep.unit])) - set(keep.indices)}


class _Training:
    """The weights as far as they have come, in float32, and the step that is due."""

    def __init__(self, held: Exchanged, units: Mapping[Address, Inner]) -> None:
        self._held, self._units = held, units
        self._now: dict[str, Tensor] = {}
        self._due: dict[str, Tensor] = {}
        self._adam: dict[str, Adam] = {}
        self.loss = 0.0
        self.reset()

    def reset(self) -> None:
        self._now = {name: dense.float() for name, dense in self._held.dense.items()}
        self._now = {name: w.clone() if w is self._held.dense[name] else w for name, w in self._now.items()}
        self._adam = {name: Adam(weight) for name, weight in self._now.items()}

    def scored(self, row: int) -> dict[Address, Tensor]:
        """Find the next step on a window, and the scores of all units now: float64 [units] on the CPU."""
        self.loss, slopes = self._held.slopes(self._rounded(), row)
        self._due = {}
        for name, slope in slopes.items():
            moved = torch.zeros_like(self._now[name])
            self._adam[name].move(moved, slope, -1.0)
            self._due[name] = moved
        raw = {address: self._figures(inner) for address, inner in self._units.items()}
        norms = torch.stack([figures.square().sum(1) for figures in raw.values()]).sum(0).sqrt() + _SAFE
        return {address: (figures / norms[:, None]).mean(0).cpu() for address, figures in raw.items()}

    def step(self, shrinking: set[tuple[Address, int]], factor: float) -> None:
        """Take the step that is due, and multiply what these units hold with a factor."""
        for name, due in self._due.items():
            self._now[name].sub_(due, alpha=RATE)
        self._multiply(self._now, shrinking, factor)

    def without(self, gone: set[tuple[Address, int]]) -> dict[str, Tensor]:
        """The weights as they would be saved, with nothing in what has gone."""
        weights = {name: weight.clone() for name, weight in self._rounded().items()}
        self._multiply(weights, gone, 0.0)
        return weights

    def _rounded(self) -> dict[str, Tensor]:
        return {name: weight.to(self._held.dense[name].dtype) for name, weight in self._now.items()}

    def _multiply(self, weights: Mapping[str, Tensor], some: set[tuple[Address, int]], factor: float) -> None:
        by_sublayer: dict[Address, list[int]] = {}
        for address, unit in some:
            by_sublayer.setdefault(address, []).append(unit)
        for address, numbers in by_sublayer.items():
            for piece in self._units[address].slices:
                if piece.parameter in weights:
                    weight = weights[piece.parameter]
                    first = torch.tensor(sorted(numbers), device=weight.device) * piece.width + piece.start
                    places = (first[:, None] + torch.arange(piece.width, device=weight.device)).reshape(-1)
                    rows = weight.index_select(piece.axis, places)
                    weight.index_copy_(piece.axis, places, rows * factor)

    def _figures(self, inner: Inner) -> Tensor:
        """The five figures of each unit, float64 [5, units]."""
        device = next(iter(self._now.values())).device
        w2, g2, wg = (torch.zeros(inner.count, dtype=torch.float64, device=device) for _ in range(3))
        size = 0
        for piece in inner.slices:
            if piece.parameter in self._due:
                w, g = (
                    t[piece.parameter]
                    .movedim(piece.axis, 0)[piece.start : piece.start + inner.count * piece.width]
                    .reshape(inner.count, -1)
                    for t in (self._now, self._due)
                )
                w2 += w.square().sum(1).double()
                g2 += g.square().sum(1).double()
                wg += (w * g).sum(1).double()
                size += w.shape[1]
        norm = w2.sqrt()
        cosine = wg / (norm + _SAFE) / (g2.sqrt() + _SAFE) + 1
        return torch.stack([norm, norm / max(size, 1), cosine, wg.abs(), wg.square() / 2])
