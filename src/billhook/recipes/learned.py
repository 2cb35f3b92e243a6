"""Choices that are learned by gradients: the model with gates, and the search that trains them."""

from __future__ import annotations

from collections.abc import Callable

from billhook import search
from billhook.data import Windows
from billhook.measure.gates import Gates
from billhook.measure.stand_ins import Adapters, LowRank
from billhook.plan.address import Address
from billhook.recipes.choices import Bandit, Sampled, Trained
from billhook.recipes.opened import Opened
from billhook.search import Found, Problem

Progress = Callable[[str, int, int], None]


def learned(
    choice: Trained | Sampled | Bandit,
    model: Opened,
    problem: Problem,
    windows: Windows,
    *,
    seed: int,
    progress: Progress | None,
) -> tuple[Found, dict[Address, float]]:
    """What is found, and what was learned of each unit (high is important)."""
    about = model.model, model.anatomy, windows, problem.candidates
    match choice:
        case Trained():
            return search.gates(problem, Gates(*about), steps=choice.steps, progress=progress)
        case Sampled():
            masked = Gates(*about, LowRank(choice.low_rank, seed) if choice.low_rank else None)
            return search.sampled(problem, masked, steps=choice.steps, rate=choice.rate, seed=seed, progress=progress)
        case Bandit():
            skipped = Gates(*about, Adapters(choice.adapters, seed) if choice.adapters else None)
            return search.bandit(
                problem,
                skipped,
                rounds=choice.rounds,
                draws=choice.draws,
                rate=choice.rate,
                seed=seed,
                progress=progress,
            )
