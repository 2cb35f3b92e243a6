"""Training what a cut left: steps, looks at held-back text, and the best of all states."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from billhook.anatomy import discover
from billhook.anatomy.types import Anatomy, Stack
from billhook.data import Windows
from billhook.heal.gaps import require_own_weights
from billhook.heal.healing import Healing, healed, require_no_channels
from billhook.heal.refit.widths import original_names, whole
from billhook.heal.training.kv_routing import Routes
from billhook.heal.training.loop import Loop
from billhook.heal.training.methods import Training
from billhook.heal.training.sharding import Shards, resting
from billhook.heal.training.student import Student, ends_of, frozen
from billhook.heal.training.subject import subject_of
from billhook.plan.check import survivors
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.record import TrainingRecord
from billhook.surgery import apply
from billhook.surgery.live import drops_of, keeps_of

Progress = Callable[[str, int, int], None]


def train(
    model: Any,
    anatomy: Anatomy,
    plan: Plan,
    start: Healing,
    windows: Windows,
    training: Training,
    *,
    tokens: int,
    state: Path,
    progress: Progress | None = None,
    weights: Tensor | None = None,
) -> tuple[Healing, TrainingRecord]:
    """Train what ``plan`` leaves of the language model ``model``, with the tensors of ``start`` in it: what closed form
    found, or ``UNTOUCHED``. The result is ``start`` with the trained tensors, and what happened.

    The last eighth of the windows is held back, and at most 4,096 tokens of it are looked at; the state that does best
    there wins, judged as it will be saved (merged, in the model's dtype) and as it was trained, with blocks missing or
    keys and values lent where they were, but without the features. Where none does better than the model was, the
    result is ``start``. The other windows are read in random order, again and again, until ``tokens`` are used; with
    ``weights`` (see ``lap``) each so often as it has weight.

    ``state`` is a file that each look replaces: weights, moments of the optimizer, the best state, the curve. The same
    call goes on from there and ends with the same curve: what is read and who is trained follows from the seed and the
    number of the step alone, and no step has chance in it.

    Under ``accelerate launch`` each process takes its share of every step's windows and gradients are averaged: the
    same result but for rounding. With ``--use_fsdp --fsdp_version 2`` each also holds only its part of the blocks of
    both models, of what is trained and of its moments; the model itself rests in the memory of the host meanwhile. The
    state is the same file either way: what several processes began one can end.

    Memory of one process alone: the model once; of what is trained just then a copy, a gradient and two moments in
    float32; of blocks that had their turn, and of the best state, as much as in the model (of adapters, float32); the
    activations of a step. Cost a token: a forward of the dense model (not where the text is the goal) and about two
    to three of what is left. Raises InputError for drops in several stacks, too little text, no keys and
    values to share where they are to be, and a launch that asks for what would not be done (see ``launch``).
    """
    require_own_weights(plan)
    require_no_channels(plan, "training")
    if isinstance(plan, Plan) and plan.factors:
        raise InputError("the plan has linears in two parts, which cannot be trained; closed-form heals them")
    stack = _stack(anatomy)
    drops = drops_of(plan, anatomy)
    ends, left = ends_of(anatomy, drops, stack), survivors(drops, anatomy.outline, stack.name)
    facts = {
        "drops": [str(unit) for unit in sorted(drops)],
        "keeps": [keep.model_dump(mode="json") for keep in keeps_of(plan, anatomy)],
        "text": windows.fingerprint,
        "training": asdict(training),
        "tokens": tokens,
        "weights": None if weights is None else hashlib.sha256(weights.cpu().double().numpy().tobytes()).hexdigest(),
    }
    with frozen(model):
        with healed(model, start):
            cut = apply(model, anatomy, plan)
        student = Student(cut, model, ends, training.goal)
        routes = Routes(cut, discover(cut)) if training.routes else None
        loop = Loop(student, windows.ids.to(model.device), training, tokens, state, facts, progress, weights, routes)
        taught = Student(cut, model, ends, "dense")
        blocks = {path: stack.blocks[old].path for path, old in zip(student.paths, left, strict=True)}
        mesh = loop.mesh()
        shards = None if mesh is None else _shards(student, model, anatomy, mesh)
        shard = None if shards is None else (lambda path: shards.take(path, blocks[path]))
        known = loop.names() if training.trains == "tune" else None
        subject = subject_of(student, taught, anatomy, stack, left, loop.fit, training, shard, known)
        if shards is None:
            found, record = loop.through(subject)
        else:
            shards.close(block.path for block in stack.blocks)
            with resting(_inside(model, stack, start)):
                found, record = loop.through(subject)
    named = original_names(anatomy, drops, found)
    new = whole(model, anatomy, keeps_of(plan, anatomy), {named[name]: tensor for name, tensor in found.items()})
    return replace(start, tensors={**start.tensors, **new}), record


def _shards(student: Student, model: Any, anatomy: Anatomy, mesh: DeviceMesh) -> Shards:
    """Of the student and a twin of the dense model: the model itself stays whole, for what comes after."""
    teacher = apply(model, anatomy, ()) if student.goal == "dense" else None
    if teacher is not None:
        student.learn_from(teacher)
    return Shards(student.model, teacher, mesh)


def _inside(model: Any, stack: Stack, start: Healing) -> list[Tensor]:
    """What need not lie on the device while shards of it do: each tensor once."""
    blocks = [parameter for block in stack.blocks for parameter in model.get_submodule(block.path).parameters()]
    return list({id(tensor): tensor for tensor in (*blocks, *start.tensors.values())}.values())


def _stack(anatomy: Anatomy) -> Stack:
    if anatomy.head is None or len(anatomy.stacks) != 1 or not anatomy.stacks[0].causal:
        raise InputError(
            f"training needs a decoder-only language model, which this {anatomy.family} model is not; "
            f"--heal closed-form needs none"
        )
    return anatomy.stacks[0]
