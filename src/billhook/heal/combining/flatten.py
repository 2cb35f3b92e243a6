"""Neighbouring blocks flattened into one, and the one cut back to the width of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from billhook.anatomy.low_rank import as_kept
from billhook.anatomy.types import Anatomy, Block, Stack, Sublayer
from billhook.data import Windows
from billhook.heal.combining.nystrom import pruned
from billhook.heal.combining.side_by_side import require_movable, side_by_side, units_in, unlike
from billhook.heal.combining.spans import Spans
from billhook.heal.gaps import runs, whole_blocks
from billhook.heal.healing import UNTOUCHED, Healing, healed
from billhook.heal.held import held_back
from billhook.heal.refit.closed_form import require_healable
from billhook.heal.refit.pool import rows
from billhook.heal.refit.ridge import Moments
from billhook.measure.batches import Batch, batches_of
from billhook.measure.patch import hooked, overridden, silencers
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Plan
from billhook.plan.record import Graft, Refit

Progress = Callable[[str, int, int], None]
ACT = "flattening"
_SMALLEST = 1e-12


def flatten(
    model: nn.Module,
    anatomy: Anatomy,
    plan: Plan | Iterable[Address],
    source: Windows | Iterable[Batch],
    progress: Progress | None = None,
) -> Healing:
    """Every dropped block is laid beside the next one that stays, and of the heads and neurons of both the best remain.

    *Flattening.* Blocks l and l + 1 become one block of twice the width, in which both read the stream x of the first:

        x' = x + sum over both of Attention(norm(x)),    x'' = x' + sum over both of MLP(norm'(x'))

    (all on x where sublayers are parallel). The sums are one attention with the heads of both and one MLP with the
    neurons of both: rows of q, k, v, gate and up one below the other, columns of o and down side by side, biases of the
    writes added up. Weights and biases of the norms move into the linears that read (W diag(g), c + W b), so that one
    plain norm serves both. Nothing is approximated but what l + 1 reads.

    *Pruning.* Each sublayer is then cut back to the KV groups or neurons of one block, so that any engine loads the
    result. With C the sums over tokens of w h h' for the inputs h of the wide write linear W (o or down) and S the
    channels that stay,

        score = diag(A (A + r)^-1), A_ij = |W_i| C_ij |W_j|,    W_S <- W_S + (C_SS + p)^-1 C_SR W_R,

    R being the channels that go: units of highest ridge leverage stay (a group counts by the sum over its channels),
    and the write takes up what the others wrote (the Nyström approximation). p is chosen on the last eighth of the
    windows, which no sum sees; where no p helps there, W_S stays as it was. w = 1 / |stream|^2. The figures on record
    are shares of the energy of what the wide sublayer writes. The MLP is pruned on what the pruned attention leaves,
    and each pair on the stream of the model as flattened so far.

    Source: FlattenGPT (arXiv 2602.08858): flattening, norms moved into linears, pruning to the width of a block, with
    Nyström approximation for the MLP. Only its abstract and summaries were at hand, and it has no public code; ours
    are the ridge r (see ``nystrom.leverage``), that a channel counts by |W_i| (so that scales that cancel in a block do
    not matter between blocks), the same rule for heads, the weights w, and p. A run of several dropped blocks goes into
    one block, which gets no wider for it; those that are not like the block behind them, and a run at the end, go into
    the block before.

    Cost: every block once, those of a flattened group twice more, and for each of its sublayers, with n channels side
    by side, eigenvalues and an inversion of n x n in float64 and a regression on half as many (see ``solve``). Memory:
    the model, one stream, three times n x n x 8 bytes. Raises InputError unless whole blocks of one stack go, where
    blocks are not alike (other masks or positions, norms of keys and queries), where norms stand elsewhere than before
    the reads, for mixtures of experts, for blocks that read keys and values of others, and for fewer than two windows.
    """
    stack, dropped = whole_blocks(anatomy, plan, ACT)
    require_healable(anatomy)
    groups = grouped(model, anatomy, stack, dropped)
    spans = Spans(model, stack, list(batches_of(source, model)))
    streams = [spans.enter(i) for i in range(len(spans.batches))]
    held = held_back([len(stream) for stream in streams])
    tensors: dict[str, Tensor] = {}
    refits: list[Refit] = []
    grafts: list[Graft] = []
    reached = 0
    for number, (receiver, members) in enumerate(sorted(groups.items())):
        streams = [spans.run(i, range(reached, members[0]), stream) for i, stream in enumerate(streams)]
        blocks = [stack.blocks[i] for i in members]
        found: dict[str, Tensor] = {}
        for new, refit, taken in _flattened(model, anatomy, spans, stack.blocks[receiver], blocks, streams, held):
            found |= new
            refits.append(refit)
            grafts += taken
        with healed(model, replace(UNTOUCHED, tensors=found)):
            streams = [spans.run(i, [receiver], stream) for i, stream in enumerate(streams)]
        tensors |= found
        reached = members[-1] + 1
        if progress is not None:
            progress(ACT, number + 1, len(groups))
    tokens = sum(stream.shape[0] * stream.shape[1] for stream in streams)
    return Healing(tensors, tuple(refits), {}, tokens, spans.work, tuple(grafts))


def grouped(model: nn.Module, anatomy: Anatomy, stack: Stack, dropped: list[int]) -> dict[int, list[int]]:
    """Block that stays -> all that become one with it, itself included, adjacent and in order. InputError where units
    cannot move, or a dropped block is like neither the block behind its run nor the one before it."""
    for number in dropped:
        require_movable(model, anatomy, stack.blocks[number])
    groups: dict[int, list[int]] = {}
    for run in runs(dropped):
        left = list(run)
        behind, before = run[-1] + 1, run[0] - 1
        why = ""
        while left and behind < len(stack.blocks) and not why:
            why = unlike(model, anatomy, stack, stack.blocks[left[-1]], stack.blocks[behind])
            if not why:
                groups.setdefault(behind, [behind]).append(left.pop())
        for block in left:
            other = unlike(model, anatomy, stack, stack.blocks[block], stack.blocks[before]) if before >= 0 else why
            if other:
                name = stack.blocks[block].address
                raise InputError(f"{name} is not like the block that it would join: {why or other}")
            groups.setdefault(before, [before]).append(block)
    for number in groups:
        require_movable(model, anatomy, stack.blocks[number])
    return {receiver: sorted(members) for receiver, members in groups.items()}


def _flattened(
    model: nn.Module,
    anatomy: Anatomy,
    spans: Spans,
    into: Block,
    blocks: list[Block],
    streams: list[Tensor],
    held: list[Tensor],
) -> Iterator[tuple[dict[str, Tensor], Refit, list[Graft]]]:
    """Sublayer by sublayer the new parameters of the block that stays, what came of its write, and what it has from
    where, given the streams before the first of all that go into it."""
    found: dict[str, Tensor] = {}
    for number, sublayer in enumerate(into.sublayers):
        given = streams
        if number and not into.parallel:
            silent = silencers(model, into.sublayers[number:])
            with healed(model, replace(UNTOUCHED, tensors=found)), overridden(silent):
                given = [spans.run(i, [into.address.block], stream) for i, stream in enumerate(streams)]
        fit, back = _moments(model, spans, [(b, b.sublayers[number]) for b in blocks], given, held)
        new, refit, units = _pruned(model, anatomy, into, blocks, number, fit, back)
        found |= new
        yield new, refit, _grafts(anatomy, sublayer, [b.sublayers[number] for b in blocks], units)


def _moments(
    model: nn.Module, spans: Spans, parts: list[tuple[Block, Sublayer]], given: list[Tensor], held: list[Tensor]
) -> tuple[Moments, Moments]:
    """Of what the writes of several sublayers are given side by side, with a constant 1 behind: to fit, held back."""
    fit, back = Moments(), Moments()
    for i, stream in enumerate(given):
        inputs: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Tensor, ...], kwargs: object, output: object) -> None:
            inputs.append(args[0].reshape(-1, args[0].shape[-1]).float())  # noqa: B023

        for block, sublayer in parts:
            write = model.get_submodule(sublayer.writes[0].removesuffix(".weight"))
            silent = silencers(model, [s for s in block.sublayers if s is not sublayer])
            with overridden(silent), hooked([(write, keep)]):
                spans.run(i, [block.address.block], stream)
        h = torch.cat([*inputs, torch.ones_like(inputs[0][:, :1])], -1)
        weight = 1 / stream.float().square().sum(-1).clamp(min=_SMALLEST)
        real, rows = spans.real(i, stream), held[i].to(stream.device)[:, None]
        for moments, chosen in ((fit, real & ~rows), (back, real & rows)):
            chosen = chosen.reshape(-1)
            moments.add(h[chosen], h.new_zeros(int(chosen.sum()), 0), weight.reshape(-1)[chosen])
    return fit, back


def _pruned(
    model: nn.Module, anatomy: Anatomy, into: Block, blocks: list[Block], number: int, fit: Moments, back: Moments
) -> tuple[dict[str, Tensor], Refit, list[int]]:
    """The parameters of a wide sublayer cut back to its best units, what came of its write, and those units."""
    sublayer = into.sublayers[number]
    name = sublayer.writes[0]
    if not torch.isfinite(fit.inputs).all():
        raise InputError(f"NaN or infinite values go into {name}: weights or inputs are damaged")
    writes = [rows(model.get_submodule(b.sublayers[number].writes[0].removesuffix(".weight"))) for b in blocks]
    columns = torch.cat([write["weight"].T.float() for write in writes])
    bias = torch.stack([write["bias"].float() for write in writes]).sum(0) if "bias" in writes[0] else None
    count = units_in(anatomy, sublayer).count
    found = pruned(fit, back, columns, bias, len(columns) // len(blocks) // count, count)
    tensors = side_by_side(model, anatomy, into, blocks, sublayer.kind, found.units.tolist())
    linear = model.get_submodule(name.removesuffix(".weight"))
    tensors[name] = as_kept(linear, found.write.T).to(tensors[name].dtype)
    if bias is not None:
        tensors[f"{name.removesuffix('weight')}bias"] = found.bias.to(tensors[name].dtype)
    refit = Refit(weight=name, before=found.before, after=found.after, penalty=found.penalty)
    return tensors, refit, found.units.tolist()


def _grafts(anatomy: Anatomy, into: Sublayer, sources: list[Sublayer], units: list[int]) -> list[Graft]:
    """How many of the units come from each of the others."""
    inner = units_in(anatomy, into)
    found = []
    for place, source in enumerate(sources):
        if source is not into:
            number = sum(unit // inner.count == place for unit in units)
            neurons, groups = (number, 0) if inner.kind == "neuron" else (0, number)
            found.append(Graft(into=str(into.address), source=str(source.address), neurons=neurons, groups=groups))
    return found
