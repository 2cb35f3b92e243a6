"""Single weights that go by a training: where it begins, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from billhook.data import Windows
from billhook.heal import Healing
from billhook.plan.address import Address
from billhook.plan.arrays import Arrays
from billhook.plan.check import check
from billhook.plan.errors import InputError
from billhook.plan.masks import parse_pattern, unpack
from billhook.plan.plan import Plan
from billhook.recipes.choices import LearnedMasks, SparseTraining
from billhook.recipes.opened import Opened
from billhook.recipes.schema import Recipe
from billhook.search import learned_masks
from billhook.search.exchanged import Goal
from billhook.search.masks import chosen
from billhook.search.sparse_steps import Rule, Sparsified, learned
from billhook.search.sparse_training import DecayingFlow, LowRankScores
from billhook.search.sparsity import Sparse, WeightProblem, edits_of, note, sparsify
from billhook.surgery.masks import masks_of

Progress = Callable[[str, int, int], None]


def learned_weights(
    recipe: Recipe,
    model: Opened,
    problem: WeightProblem,
    windows: Windows,
    lessons: Windows,
    prior: Plan | None,
    *,
    seed: int,
    progress: Progress | None,
) -> tuple[Sparse, float]:
    """What goes, and the objective on the held-back part of ``lessons``. It begins with the masks that a measure finds
    on ``windows``, or with those of ``prior``."""
    choice = recipe.choice
    assert isinstance(choice, LearnedMasks | SparseTraining)
    held = Sparsified(model.model, model.anatomy, problem.stack, lessons, goal_of(recipe))
    pattern = parse_pattern(choice.pattern)
    rule: Rule
    work = 0
    if isinstance(choice, SparseTraining):
        kind = LowRankScores if choice.rule == "low-rank-scores" else DecayingFlow
        rule = kind(held.linears, held.dense, 1 - problem.share, pattern, seed)
    else:
        assert pattern is not None
        masks, work = _begun(choice, pattern, model, problem, windows, prior, held, progress)
        rule = learned_masks.LearnedMasks(held.linears, held.dense, masks, seed, pattern[1])
    state, looks = learned(held, rule, steps=choice.steps, what="sparse training", progress=progress)
    zeros: dict[Address, dict[str, int]] = {}
    arrays: dict[str, NDArray[Any]] = {}
    for unit, mine in held.units.items():
        for linear in mine:
            note(zeros, arrays, unit, linear, state.masks[linear.name])
    healing = Healing(state.weights, (), {}, lessons.tokens, 0) if state.weights else None
    best = min(look.held for look in looks)
    return Sparse(edits_of(zeros, pattern), Arrays(arrays), {}, work + held.work, healing), best


def goal_of(recipe: Recipe) -> Goal:
    return "loss" if recipe.objective == "loss" else "kl"


def _begun(
    choice: LearnedMasks,
    pattern: tuple[int, int],
    model: Opened,
    problem: WeightProblem,
    windows: Windows,
    prior: Plan | None,
    held: Sparsified,
    progress: Progress | None,
) -> tuple[Mapping[str, Tensor], int]:
    """The masks to begin with, and the work of finding them."""
    if prior is not None:
        return after(prior, model, held, 1 - problem.share, pattern), 0
    shares = dict.fromkeys((block.address.block for block in model.anatomy.stack(problem.stack).blocks), problem.share)
    about = model.model, model.anatomy, problem.stack, shares, windows
    found = sparsify(*about, by=choice.by, pattern=pattern, progress=progress)
    return kept_of(Plan.of([], sparsities=found.edits, arrays=found.arrays), model, held), found.work


def require_prior(prior: Plan, model: Opened) -> None:
    """InputError for a plan without masks, or with masks of another model."""
    if not prior.sparsities:
        raise InputError("the prior sets no weights to zero: give the folder of a result of single weights")
    check(prior, model.anatomy.outline)
    masks_of(prior, model.anatomy, model.model)


def kept_of(plan: Plan, model: Opened, held: Sparsified) -> dict[str, Tensor]:
    """The masks of a plan, bool in the shape of each weight, of all linears."""
    packed = masks_of(plan, model.anatomy, model.model)
    return {
        name: torch.from_numpy(unpack(packed[name], tuple(dense.shape))).to(dense.device)
        if name in packed
        else torch.ones_like(dense, dtype=torch.bool)
        for name, dense in held.dense.items()
    }


def after(prior: Plan, model: Opened, held: Sparsified, share: float, pattern: tuple[int, int]) -> Mapping[str, Tensor]:
    """Masks that keep ``share`` in a ``pattern``: first what the prior keeps, the larger weights before the smaller."""
    found = {}
    for name, kept in kept_of(prior, model, held).items():
        linear, dense = held.linears[name], held.dense[name]
        size = linear.rows(dense).float().abs()
        saliency = size + linear.rows(kept) * (size.max() + 1)
        found[name] = linear.whole(chosen(saliency, share, pattern, by_row=False), dense)
    return found
