"""Which windows of a text a training is to read, and how often: the words for selecting data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from billhook.anatomy.types import Anatomy
from billhook.data import Windows
from billhook.data.resampling import log_ratios, resampled
from billhook.heal.healing import Healing, healed
from billhook.heal.selecting.clusters import clusters
from billhook.heal.selecting.harm import harmed
from billhook.heal.selecting.paser import concepts_of, paser
from billhook.heal.selecting.reweighting import alignments, by_alignment, by_loss, losses
from billhook.heal.training.loop import split
from billhook.heal.training.methods import Goal
from billhook.heal.training.student import Student, ends_of, frozen
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.record import Group, Select, SelectionRecord
from billhook.surgery import apply
from billhook.surgery.live import drops_of

Progress = Callable[[str, int, int], None]

WHY: dict[Select, str] = {
    "distinct": "every window that is no duplicate of an earlier one",
    "dsir": "windows whose n-grams are likelier in the target than in the text, by importance resampling",
    "loss": "windows that the cut model is still bad at are read more often",
    "gradient": "windows whose gradients point where those of the target do are read more often",
    "paser": "kinds of text by what the cut cost them, the most harmed windows of each, without conflicts",
}


@dataclass(frozen=True)
class Selection:
    """How to select from ``windows``, of a text from whose ``parts`` so many ``duplicates`` were left out already. The
    words dsir and gradient have a ``target``; dsir and paser choose ``count`` windows, the others weigh all."""

    word: Select
    windows: Windows
    count: int
    parts: int
    duplicates: int
    target: Windows | None = None

    def __post_init__(self) -> None:
        there = len(split(self.windows.ids)[0])
        if self.word in ("dsir", "paser") and self.count >= there:
            raise InputError(
                f"--select {self.word} has nothing to choose from: the training reads {self.count} windows, and text "
                f"{self.windows.name} has {there} to learn from; give more text"
            )


def select(
    model: Any,
    anatomy: Anatomy,
    plan: Plan,
    start: Healing,
    selection: Selection,
    goal: Goal,
    seed: int,
    progress: Progress | None = None,
) -> tuple[Tensor | None, SelectionRecord]:
    """Weights of the windows that ``split`` leaves to learn from, float64 [n] of sum one (None: all alike), and the
    record. The windows held back play no part in it, so a state of the training is judged on text as it comes.

    Losses and gradients are those of what ``plan`` leaves of ``model`` with the tensors of ``start``. Cost: no
    forward for distinct and dsir; two of all windows (dense and cut) for paser, and for loss where the dense model is
    the goal (else one), twice that and more for gradient. The same call gives the same weights on one machine.
    """
    ids = split(selection.windows.ids)[0].to(model.device)
    groups: tuple[Group, ...] = ()
    screened, weights = 0, None
    if selection.word == "dsir":
        weights = _equal(resampled(log_ratios(ids, _target(selection)), selection.count, seed).tolist(), len(ids))
    elif selection.word != "distinct":
        with frozen(model):
            student = _student(model, anatomy, plan, start, "dense" if selection.word == "paser" else goal)
            if selection.word == "loss":
                weights = by_loss(losses(student, ids, progress))
            elif selection.word == "gradient":
                weights = by_alignment(alignments(student, ids, _target(selection).to(ids.device), progress))
            else:
                harm, points = harmed(student, ids, progress)
                kinds = clusters(points, seed)
                choice = paser(kinds, harm, concepts_of(ids.cpu().numpy()), selection.count)
                weights, screened = _equal(choice.chosen, len(ids)), choice.screened
                groups = tuple(
                    Group(
                        windows=int((kinds == kind).sum()),
                        chosen=int((kinds[choice.chosen] == kind).sum()),
                        harm=float(harm[kinds == kind].mean()),
                    )
                    for kind in np.unique(kinds)
                )
    return weights, SelectionRecord(
        word=selection.word,
        why=WHY[selection.word],
        target=selection.target.name if selection.target is not None else "",
        parts=selection.parts,
        duplicates=selection.duplicates,
        windows=len(ids),
        chosen=len(ids) if weights is None else int((weights > 0).sum()),
        effective=float(len(ids)) if weights is None else 1 / weights.square().sum().item(),
        groups=groups,
        screened=screened,
    )


def _student(model: Any, anatomy: Anatomy, plan: Plan, start: Healing, goal: Goal) -> Student:
    ends = ends_of(anatomy, drops_of(plan, anatomy), anatomy.stacks[0])
    with healed(model, start):
        cut = apply(model, anatomy, plan)
    return Student(cut, model, ends, goal)


def _target(selection: Selection) -> Tensor:
    assert selection.target is not None
    return selection.target.ids


def _equal(chosen: list[int], count: int) -> Tensor:
    weights = torch.zeros(count, dtype=torch.float64)
    weights[chosen] = 1 / len(chosen)
    return weights
