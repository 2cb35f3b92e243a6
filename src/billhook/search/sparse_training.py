"""Rules by which weights and masks are trained together (see ``sparse_steps``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.anatomy.linears import Linear
from billhook.search.adam import Adam
from billhook.search.masks import Pattern, chosen
from billhook.search.sparse_steps import State

RANK = 8
RATE = 0.02  # of the mean size of a weight: what Adam moves scores and weights by in a step
WARM, COLD = 0.1, 0.3  # of the steps: dense before weights begin to go, and with the final share of them afterwards


@dataclass(frozen=True, eq=False)
class _Factors:
    """Of one linear, ``u`` [outputs, rank] and ``v`` [rank, inputs]: the product is what is learned."""

    u: Tensor
    v: Tensor
    adam: tuple[Adam, Adam]

    @classmethod
    def of(cls, weight: Tensor, draw: torch.Generator) -> _Factors:
        u = torch.randn(weight.shape[0], RANK, generator=draw, device=weight.device) / RANK**0.5
        v = torch.zeros(RANK, weight.shape[1], device=weight.device)
        return cls(u, v, (Adam(u), Adam(v)))

    def move(self, slope: Tensor, rate: float) -> None:
        of_u, of_v = slope @ self.v.T, self.u.T @ slope
        self.adam[0].move(self.u, of_u, rate)
        self.adam[1].move(self.v, of_v, rate)


@dataclass(frozen=True, eq=False)
class _Scores:
    """Of one linear: a change of the weight and a part of the scores of low rank, and a score of each row [outputs, 1]
    and column [1, inputs]. ``scale`` is the mean size of a weight."""

    change: _Factors
    part: _Factors
    row: Tensor
    column: Tensor
    adam: tuple[Adam, Adam]
    scale: float

    @classmethod
    def of(cls, weight: Tensor, draw: torch.Generator) -> _Scores:
        row, column = (torch.zeros(shape, device=weight.device) for shape in ((len(weight), 1), (1, weight.shape[1])))
        change, part = _Factors.of(weight, draw), _Factors.of(weight, draw)
        return cls(change, part, row, column, (Adam(row), Adam(column)), weight.abs().mean().item())


class LowRankScores:
    """A rule: few numbers learn which weights stay, and how they change.

    A weight is W + U V, its score |W + U V| + A B + r + c with A B of rank 8 and r, c one number a row and column.
    Those of highest score of a linear stay (with a pattern of each M inputs). The slope of a score is that of its entry
    of the mask (straight through), which reaches W + U V by |W + U V| too; beside that it has those of what stays.
    The share that goes rises with 1 - (1 - t)^3 from none, after a tenth of the steps, to all, three tenths before the
    end. U and A are drawn at random, all else begins at zero.

    Source: PST (arXiv 2205.11005) and its authors' code (alibaba/AliceMind): scores, slopes, schedule and rank from
    there. The share of warm and cold steps and rates are our own: Adam, by 2% of the mean size of a weight a step, to
    which U and A add a factor of about one.
    """

    def __init__(
        self, linears: Mapping[str, Linear], dense: Mapping[str, Tensor], share: float, pattern: Pattern, seed: int
    ) -> None:
        """``share`` of the weights of each linear stays in the end."""
        self._linears, self._dense, self._share, self._pattern = linears, dense, share, pattern
        draw = torch.Generator(next(iter(dense.values())).device).manual_seed(seed)
        self._scores = {name: _Scores.of(self._rows(name), draw) for name in linears}
        self._given: dict[str, Tensor] = {}

    def given(self, name: str, along: float) -> Tensor:
        far = min(1.0, max(0.0, (along - WARM) / (1 - WARM - COLD)))
        share = 1 - (1 - self._share) * (1 - (1 - far) ** 3)
        weight = self._weight(name)
        mask = self._mask(name, weight, share) if share < 1 else torch.ones_like(weight, dtype=torch.bool)
        self._given[name] = mask
        return self._whole(name, weight * mask)

    def learn(self, name: str, slope: Tensor, along: float) -> None:
        scores, weight, mask = self._scores[name], self._weight(name), self._given.pop(name)
        slope = self._linears[name].rows(slope).float()
        of_score = slope * weight
        of_weight = slope * mask + of_score * weight.sign()
        rate = RATE * scores.scale
        scores.change.move(of_weight, rate)
        scores.part.move(of_score, rate)
        scores.adam[0].move(scores.row, of_score.sum(1, keepdim=True), rate)
        scores.adam[1].move(scores.column, of_score.sum(0, keepdim=True), rate)

    def state(self) -> State:
        masks, weights = {}, {}
        for name, dense in self._dense.items():
            weight = self._weight(name)
            mask = self._mask(name, weight, self._share)
            masks[name] = self._linears[name].whole(mask, dense)
            weights[name] = self._whole(name, weight)
        return State(masks, weights)

    def _mask(self, name: str, weight: Tensor, share: float) -> Tensor:
        scores = self._scores[name]
        score = weight.abs() + scores.part.u @ scores.part.v + scores.row + scores.column
        return chosen(score, share, self._pattern, by_row=False)

    def _weight(self, name: str) -> Tensor:
        change = self._scores[name].change
        return self._rows(name) + change.u @ change.v

    def _rows(self, name: str) -> Tensor:
        return self._linears[name].rows(self._dense[name]).float()

    def _whole(self, name: str, rows: Tensor) -> Tensor:
        return self._linears[name].whole(rows, self._dense[name]).to(self._dense[name].dtype)


class DecayingFlow:
    """A rule: all weights train, and those that the pattern takes fade from the forward pass, so that the slopes which
    come back to them are those of a model that still has a part of them.

    The largest weights of each M inputs stay, as they are at every step; the others are multiplied with a factor that
    falls from 1 to 0 in a straight line, three tenths of the steps before the end. Slopes reach all weights alike.

    Source: Progressive gradient flow (arXiv 2402.04744) and its authors' code
    (abhibambhaniya/progressive_gradient_flow_nm_sparsity): linear decay of the mask, masks by magnitude, a last part
    with hard masks; patterns that get sparser step by step are left out. Adam with 2% of the mean size of a weight a
    step is our own. Memory: three float32 copies of the weights.
    """

    def __init__(
        self, linears: Mapping[str, Linear], dense: Mapping[str, Tensor], share: float, pattern: Pattern, seed: int
    ) -> None:
        """``share`` of the weights of each linear stays in the end; nothing is drawn at random."""
        self._linears, self._dense, self._share, self._pattern = linears, dense, share, pattern
        self._now = {name: linear.rows(dense[name]).float().clone() for name, linear in linears.items()}
        self._adam = {name: Adam(weight) for name, weight in self._now.items()}
        self._rates = {name: RATE * weight.abs().mean().item() for name, weight in self._now.items()}

    def given(self, name: str, along: float) -> Tensor:
        left = max(0.0, 1 - along / (1 - COLD))
        weight = self._now[name]
        return self._whole(name, torch.where(self._mask(weight), weight, weight * left))

    def learn(self, name: str, slope: Tensor, along: float) -> None:
        self._adam[name].move(self._now[name], self._linears[name].rows(slope), self._rates[name])

    def state(self) -> State:
        masks, weights = {}, {}
        for name, weight in self._now.items():
            masks[name] = self._linears[name].whole(self._mask(weight), self._dense[name])
            weights[name] = self._whole(name, weight)
        return State(masks, weights)

    def _mask(self, weight: Tensor) -> Tensor:
        return chosen(weight.abs(), self._share, self._pattern, by_row=False)

    def _whole(self, name: str, rows: Tensor) -> Tensor:
        return self._linears[name].whole(rows, self._dense[name]).to(self._dense[name].dtype)
