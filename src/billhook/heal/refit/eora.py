"""Paths of low rank beside linears that have zeros among their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy.linears import Linear, linears
from billhook.anatomy.types import Anatomy, Block
from billhook.data import Windows
from billhook.heal.healing import Healing, carried_out
from billhook.heal.held import parted
from billhook.heal.judge import divergences
from billhook.heal.refit.moments import moments
from billhook.heal.refit.places import at_once
from billhook.heal.refit.stepping import Stepper
from billhook.measure.batches import batches_of
from billhook.measure.spectrum import spectrum
from billhook.models.adapter import attach
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan

Progress = Callable[[str, int, int], None]
SHARE = 0.1  # parameters of a path, of those of its linear
BESIDE_EXPERTS = "peft takes it for an expert's"
STACKED = "fused experts: what each is given is not seen"


@torch.no_grad()
def eora(
    model: Any, anatomy: Anatomy, plan: Plan, start: Healing, windows: Windows, progress: Progress | None = None
) -> Healing:
    """Each linear that lost single weights gets a path of low rank beside it: what it lacks of the dense one, as far as
    that reaches its outputs.

    With L = W - W' what a linear lacks [outputs, inputs] and C the sum of x x' over its inputs, EoRA (arXiv 2410.21271,
    section 3) projects L into the eigenspace of C = Q S Q' and takes B A as the first r singular directions of
    L Q S^(1/2), projected back. Those are B = U, the first r eigenvectors of L C L', and A = U'L: of rank r the matrix
    nearest to L on those inputs, and nothing need be inverted. r is what makes a path a tenth of the linear's
    parameters (the paper leaves it to the user: 64 to 512). C is that of the compressed model, behind the paths of the
    blocks before: what the linear will be given (NVlabs/EoRA streams likewise). Nothing is merged: what has zeros keeps
    them, and a linear that has none could as well have its dense weights back.

    ``start`` are the weights that came with the masks. They stay as they are; of the windows the last eighth is held
    back, and a model that its paths bring no nearer to the dense one there is left without (``refused``).

    Left alone, with the reason: fused experts, and the other linears of MLPs in a model that has some. Cost: two passes
    of the compressed model and an eigenvalue decomposition for each linear, and two forwards of the dense and the
    compressed model over what is held back. Memory: the model, one stream, the moments of a block. InputError for a
    plan that does anything but set weights to zero, and fewer than two windows.
    """
    require_only_masks(plan)
    fitted, held = parted(windows)
    small = carried_out(model, anatomy, plan, start)
    (name,) = {edit.unit.stack for edit in plan.sparsities}
    stack = anatomy.stack(name)
    stepper = Stepper(small, stack, list(batches_of(fitted, small)))
    streams = [stepper.enter(i) for i in range(len(stepper.batches))]
    paths: dict[str, tuple[Tensor, Tensor]] = {}
    left: dict[str, str] = {}
    for number, block in enumerate(stack.blocks):
        takers, others = takers_of(model, block)
        masked = {
            f"{block.path}.{inside}"
            for edit in plan.sparsities
            for inside in edit.zeros
            if edit.unit.parent == block.address
        }
        left |= {name: reason for name, reason in others.items() if name in masked}
        mine = [linear for linear in takers if linear.name in masked]
        seen = moments(stepper, block, [linear.name for linear in mine], streams)
        found = {}
        for linear in mine:
            dense, now = (linear.rows(side.get_parameter(linear.name).detach()) for side in (model, small))
            lack = dense.float() - now.float()
            found[linear.name.removesuffix(".weight")] = nearest(lack, seen[linear.name], rank_of(*lack.shape))
        attach(small, found)
        paths |= found
        streams = [stepper.run(i, at_once(block), stream, ()) for i, stream in enumerate(streams)]
        if progress is not None:
            progress("paths", number + 1, len(stack.blocks))
    tokens = sum(stream.shape[0] * stream.shape[1] for stream in streams)
    healing = replace(start, paths=paths, left_alone=left, tokens=tokens, work=2 * tokens * len(stack.blocks))
    without, beside = divergences(model, anatomy, plan, [start, healing], held)
    healing = replace(healing, cut=without, healed=beside)
    return replace(healing, paths={}) if healing.refused else healing


def nearest(lack: Tensor, seen: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, inputs] and B [outputs, rank], float32, whose product is nearest to ``lack`` [outputs, inputs] on inputs
    of the second moments ``seen`` [inputs, inputs]: the least trace of (lack - B A) seen (lack - B A)'."""
    b = spectrum(lack, seen, rank).basis.to(lack.device)
    return b.T @ lack, b


def rank_of(outputs: int, inputs: int) -> int:
    """Of the path beside a linear: so that it has a tenth of its parameters."""
    return max(1, round(SHARE * outputs * inputs / (outputs + inputs)))


def takers_of(model: nn.Module, block: Block) -> tuple[list[Linear], dict[str, str]]:
    """The linears of a block that a path can stand beside, and the others with the reason."""
    found, others = [], {}
    stacked = any(parameter.ndim == 3 for name, parameter in model.named_parameters() if ".experts." in name)
    for sublayer in block.sublayers:
        for linear in linears(model, sublayer, block.path):
            if model.get_parameter(linear.name).ndim == 3:
                others[linear.name] = STACKED
            elif stacked and sublayer.kind == "mlp":
                others[linear.name] = BESIDE_EXPERTS
            else:
                found.append(linear)
    return found, others


def size_of(model: nn.Module, anatomy: Anatomy, stack: str) -> int:
    """Parameters of the paths if all linears of a stack that can have one get one."""
    shapes = [
        linear.rows(model.get_parameter(linear.name)).shape
        for block in anatomy.stack(stack).blocks
        for linear in takers_of(model, block)[0]
    ]
    return sum(rank_of(*shape) * sum(shape) for shape in shapes)


def require_only_masks(plan: Plan) -> None:
    """InputError for a plan that sets no single weights to zero, or does anything else."""
    if not plan.sparsities:
        raise InputError("eora puts paths beside linears that lost single weights; the plan sets no weights to zero")
    if len(plan.sparsities) < len(plan.edits) or plan.schedule is not None:
        raise InputError("eora takes plans that set weights to zero and do nothing else")
    if len({edit.unit.stack for edit in plan.sparsities}) > 1:
        raise InputError("healing takes one stack at a time")
