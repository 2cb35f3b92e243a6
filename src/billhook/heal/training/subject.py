"""What of a student is trained: found once, before the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from billhook.anatomy.bridge import BRIDGE
from billhook.anatomy.types import Anatomy, Stack
from billhook.heal.training.damage import Damage, damage, feature_weights, sample
from billhook.heal.training.layers import Layers
from billhook.heal.training.lora import Adapters, linears, ranks_by_loss
from billhook.heal.training.methods import Training
from billhook.heal.training.scales import Scaled, scales_of
from billhook.heal.training.sharding import part
from billhook.heal.training.student import Student
from billhook.heal.training.tune import least_expressive, subsets
from billhook.heal.training.weights import Weights
from billhook.plan import processes
from billhook.plan.errors import InputError

PROBE = 4  # steps with which the subsets of tune are told apart


@dataclass(frozen=True)
class Subject:
    """``holder`` has the parameters that are trained; ``layers`` says, where blocks take turns, whose turn it is;
    ``ranks`` are those of the adapters by block that stays."""

    holder: Adapters | Weights
    layers: Layers | None = None
    ranks: tuple[int, ...] = field(default=())

    @property
    def count(self) -> int:
        """Of all parameters that may be trained."""
        return sum(self.holder.model.get_parameter(name).numel() for name in self.holder.names)


def subject_of(
    student: Student,
    taught: Student,
    anatomy: Anatomy,
    stack: Stack,
    left: list[int],
    ids: Tensor,
    training: Training,
    shard: Callable[[str], None] | None = None,
    known: list[str] | None = None,
) -> Subject:
    """Make ready what ``training`` trains, and give the student its feature terms. ``taught`` is the same student
    learning from the dense model; ``left`` are the original numbers of its blocks; ``ids`` windows to measure on.
    ``shard`` is called for the path of each block of the student as soon as it has what is trained (see ``Shards``).
    ``known`` are the names that tune chose when it began, if this is not the beginning.

    InputError where the model has nothing of the kind."""
    few = sample(ids, range(len(ids)))
    found = damage(taught, few) if training.features != "none" or training.trains == "lora" else None
    if found is not None:
        student.weights = feature_weights(found, training.features)
    if training.trains == "lora":
        assert found is not None
        return _adapted(student, anatomy, stack, left, found, training, shard)
    if training.trains == "tune":
        scales = scales_of(student.model, chain(*_linears(student, stack, left)))
        options = subsets(student.model, student.paths, scales)
        if not options:
            raise InputError("no biases, norms or linears are left to tune; train with lisa")
        names = known or _agreed(least_expressive(options, lambda subset: _gain(student, subset, few, training)))
        return Subject(Scaled(student.model, student.paths, names, shard))
    names = [f"{path}.{name}" for path in student.paths for name in _names(student, path)]
    first = names if training.trains == "fpf" else []
    before = {name: student.model.get_parameter(name).detach() for name in first}
    weights = Weights(student.model, student.paths, names, shard, first)
    before = {name: part(tensor, weights.parameters[name]) for name, tensor in before.items()}
    return Subject(weights, Layers(student, weights, before, training))


def _adapted(
    student: Student,
    anatomy: Anatomy,
    stack: Stack,
    left: list[int],
    found: Damage,
    training: Training,
    shard: Callable[[str], None] | None,
) -> Subject:
    ranks = ranks_by_loss(found.errors, training.rank)
    by_path: dict[str, int] = {}
    for of_block, rank in zip(_linears(student, stack, left), ranks, strict=True):
        by_path |= dict.fromkeys(of_block, rank)
    if not by_path:
        raise InputError(f"a {anatomy.family} model cut like this has no linears left that adapters go on")
    adapters = Adapters(student.model, student.paths, by_path, training.seed, shard)
    return Subject(adapters, ranks=tuple(ranks))


def _linears(student: Student, stack: Stack, left: list[int]) -> list[list[str]]:
    """Of each block that stays."""
    pairs = ((stack.blocks[old], new) for old, new in zip(left, student.paths, strict=True))
    return [linears(student.model, block, block.path, new) for block, new in pairs]


def _agreed(names: list[str]) -> list[str]:
    """What the first of several processes chose."""
    found = [names]
    if processes.count() > 1:
        broadcast_object_list(found)
    return found[0]


def _gain(student: Student, names: list[str], ids: Tensor, training: Training) -> float:
    """By how much a few steps with these parameters on half of the windows lower the loss on the others (on the same
    one, if there is but one)."""
    half = (len(ids) + 1) // 2
    seen, others = ids[:half], ids[half:] if len(ids) > 1 else ids
    weights = Scaled(student.model, student.paths, names)

    @torch.no_grad()
    def judged() -> float:
        return float(student(others).item())

    try:
        optimizer = torch.optim.AdamW(list(weights.parameters.values()), lr=training.rate, weight_decay=0.0)
        before = judged()
        for _ in range(PROBE):
            optimizer.zero_grad()
            student(seen).backward()
            optimizer.step()
        return before - judged()
    finally:
        weights.remove()


def _names(student: Student, path: str) -> list[str]:
    module: Any = student.model.get_submodule(path)
    return [name for name, _ in module.named_parameters() if not name.startswith(f"{BRIDGE}.")]
