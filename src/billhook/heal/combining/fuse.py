"""Dropped blocks fused into their neighbours, with learned low-rank coefficients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from billhook.anatomy.types import Anatomy, Block
from billhook.anatomy.undo import Undo
from billhook.data import Windows
from billhook.heal.combining.spans import Spans
from billhook.heal.gaps import runs, whole_blocks
from billhook.heal.healing import Healing, put
from billhook.heal.held import held_back
from billhook.heal.refit.closed_form import require_healable
from billhook.measure.batches import Batch, batches_of
from billhook.plan.address import Address
from billhook.plan.plan import Plan
from billhook.plan.record import Refit

Progress = Callable[[str, int, int], None]
OTHER_SHAPE = "no dropped block beside it has a matrix of the same name and shape"
_SMALLEST = 1e-12


def fuse(
    model: nn.Module,
    anatomy: Anatomy,
    plan: Plan | Iterable[Address],
    source: Windows | Iterable[Batch],
    progress: Progress | None = None,
    *,
    reach: int = 2,
    rank: int = 16,
    passes: int = 3,
    rate: float = 0.01,
    seed: int = 0,
) -> Healing:
    """Inject what is dropped into the blocks around it.

    For each run of dropped blocks, the first one first, the ``reach`` blocks that stay on either side are a group. Each
    matrix W through which they read or write becomes

        W + sum over the dropped d of (A_d B_d) * W_d,

    * element by element, W_d the matrix of the same name in d, A_d [rows, rank] and B_d [rank, columns] learned (A
    begins at 0, so the beginning is the plain cut), W and W_d frozen. Learned is to give, for the stream of the cut
    model so far at the group's beginning, the dense stream at its end: squared error, each token relative to the dense
    stream, by Adam, ``passes`` times over the text. The last eighth of the windows is never learned from; a group that
    does not lower the error there stays as it was. The result is an ordinary model of the same architecture.

    Source: FuseGPT (arXiv 2411.14507), group-level fusion. Left open there or chosen otherwise: the runs are taken from
    front to back, each once, where the paper alternates pruning one block and fusing it; its public code learns a plain
    low-rank update of W beside the coefficients, the abstract does not have one, nor is it here. Left alone: matrices
    of another shape than any dropped one's, and experts that are one tensor.

    Cost: the dense blocks once; for each run of dropped blocks what stays before it once, and its group
    3 ``passes`` + 2 times (a backward pass counts twice a forward). Memory: the model, two streams, and the activations
    of one group for one batch. Raises InputError unless whole blocks of one stack go, for blocks that read the keys and
    values of others, and for fewer than two windows.
    """
    stack, dropped = whole_blocks(anatomy, plan, "fusing")
    require_healable(anatomy)
    spans = Spans(model, stack, list(batches_of(source, model)))
    start = [spans.enter(i) for i in range(len(spans.batches))]
    held = held_back([len(stream) for stream in start])
    kept = [i for i in range(len(stack.blocks)) if i not in dropped]
    gaps = runs(dropped)
    dense, reached = start, 0
    tensors: dict[str, Tensor] = {}
    refits: dict[str, Refit] = {}
    left: dict[str, str] = {}
    for number, run in enumerate(gaps):
        group = [i for i in kept if i < run[0]][-reach:] + [i for i in kept if i > run[-1]][:reach]
        end = max(group[-1], run[-1]) + 1
        dense = [spans.run(i, range(reached, end), stream) for i, stream in enumerate(dense)]
        reached = end
        undo = Undo()
        try:
            for name, tensor in tensors.items():
                put(model, name, tensor, undo)
            before = [i for i in kept if i < group[0]]
            given = [spans.run(i, before, stream) for i, stream in enumerate(start)]
            mixes = _mixes(model, [stack.blocks[i] for i in group], [stack.blocks[i] for i in run], rank, seed)
            matched = {mix.name for mix in mixes}
            around = [name for i in group for name in _matrices(model, stack.blocks[i]).values()]
            left |= {name: OTHER_SHAPE for name in around if name not in matched}
            errors = _learn(spans, group, mixes, given, dense, held, passes, rate)
            taken = errors[1] < errors[0]
            if taken:
                tensors |= {mix.name: mix.weight().detach() for mix in mixes}
            for mix in mixes:
                found = Refit(weight=mix.name, before=errors[0], after=min(errors), penalty=0.0 if taken else None)
                if taken or mix.name not in refits:
                    refits[mix.name] = found
        finally:
            undo.restore()
        if progress is not None:
            progress("fusing", number + 1, len(gaps))
    tokens = sum(stream.shape[0] * stream.shape[1] for stream in start)
    left = {name: reason for name, reason in left.items() if name not in refits}
    return Healing(tensors, tuple(refits.values()), left, tokens, spans.work)


@dataclass(frozen=True)
class _Mix:
    """One matrix of a block that stays, with those of the dropped blocks and their coefficients."""

    name: str
    own: Tensor
    others: tuple[Tensor, ...]
    factors: tuple[tuple[Tensor, Tensor], ...]

    def weight(self) -> Tensor:
        total = self.own.float()
        for other, (a, b) in zip(self.others, self.factors, strict=True):
            total = total + (a @ b) * other.float()
        return total.to(self.own.dtype)


def _matrices(model: nn.Module, block: Block) -> dict[str, str]:
    """The matrices through which a block reads and writes: name inside the block -> name in the model."""
    names = [name for sublayer in block.sublayers for name in (*sublayer.reads, *sublayer.writes)]
    found = {name.removeprefix(f"{block.path}."): name for name in names}
    return {inside: name for inside, name in found.items() if model.get_parameter(name).ndim == 2}


def _mixes(model: nn.Module, group: list[Block], run: list[Block], rank: int, seed: int) -> list[_Mix]:
    generator = torch.Generator().manual_seed(seed)
    donors = [{inside: model.get_parameter(name).detach() for inside, name in _matrices(model, b).items()} for b in run]
    mixes = []
    for block in group:
        for inside, name in _matrices(model, block).items():
            own = model.get_parameter(name).detach()
            others = tuple(d[inside] for d in donors if inside in d and d[inside].shape == own.shape)
            factors = []
            for _ in others:
                b = torch.randn(rank, own.shape[1], generator=generator).to(own.device) / rank**0.5
                factors.append((own.new_zeros(own.shape[0], rank, dtype=torch.float32), b))
            if others:
                mixes.append(_Mix(name, own, others, tuple(factors)))
    return mixes


def _learn(
    spans: Spans,
    group: list[int],
    mixes: list[_Mix],
    given: list[Tensor],
    goal: list[Tensor],
    held: list[Tensor],
    passes: int,
    rate: float,
) -> tuple[float, float]:
    """Learn the coefficients in place; the held-back error before and after."""
    learned = [factor.requires_grad_() for mix in mixes for pair in mix.factors for factor in pair]
    first = _error(spans, group, given, goal, held)
    if not learned:
        return first, first
    optimiser = torch.optim.Adam(learned, lr=rate)
    for _ in range(passes):
        for i, stream in enumerate(given):
            weight = _weights(spans, i, goal[i], ~held[i])
            if not weight.any():
                continue
            with torch.enable_grad(), _shadowed(spans.model, mixes):
                out = spans.run(i, group, stream, gradients=True)
                loss = (weight * (out.float() - goal[i].float()).square().sum(-1)).sum() / (weight > 0).sum()
                gradients = torch.autograd.grad(loss, learned)
            spans.work += 2 * len(group) * stream.shape[0] * stream.shape[1]
            for factor, gradient in zip(learned, gradients, strict=True):
                factor.grad = gradient
            optimiser.step()
    with torch.no_grad(), _shadowed(spans.model, mixes):
        return first, _error(spans, group, given, goal, held)


def _error(spans: Spans, group: list[int], given: list[Tensor], goal: list[Tensor], held: list[Tensor]) -> float:
    """The mean squared error over the tokens that are held back, each relative to the dense stream."""
    total, count = 0.0, 0
    for i, stream in enumerate(given):
        if held[i].any():
            weight = _weights(spans, i, goal[i], held[i])
            error = (spans.run(i, group, stream).float() - goal[i].float()).square().sum(-1)
            total += (weight * error).sum(dtype=torch.float64).item()
            count += int((weight > 0).sum())
    return total / max(count, 1)


def _weights(spans: Spans, batch: int, goal: Tensor, rows: Tensor) -> Tensor:
    """1 / |dense stream|^2 for the real tokens of these rows, 0 for all others: [rows, tokens]."""
    used = spans.real(batch, goal) & rows.to(goal.device)[:, None]
    return used / goal.float().square().sum(-1).clamp(min=_SMALLEST)


@contextmanager
def _shadowed(model: nn.Module, mixes: list[_Mix]) -> Iterator[None]:
    """Inside, each matrix is what its mix says, as a part of the graph: an attribute of the module that hides its
    parameter, which stays where it is."""
    owners = []
    try:
        for mix in mixes:
            path, _, leaf = mix.name.rpartition(".")
            owner = model.get_submodule(path)
            owners.append((owner, leaf))
            owner.__dict__[leaf] = mix.weight()
        yield
    finally:
        for owner, leaf in owners:
            owner.__dict__.pop(leaf, None)
