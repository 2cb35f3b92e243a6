"""Experts merged into those that stay, after M-SMoE."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy.mixtures import Mixture, gated, mixture_of, neuron_axes, neuron_values
from billhook.anatomy.types import Anatomy, Block
from billhook.anatomy.undo import Undo
from billhook.anatomy.vocabulary import DOWN, GATE_UP
from billhook.data import Windows
from billhook.heal.combining.alike import averaged, grouped
from billhook.heal.combining.condense import Expert, foremost, low_reads, low_writes
from billhook.heal.combining.spans import Spans
from billhook.heal.healing import Healing, put, require_no_channels
from billhook.heal.held import held_back
from billhook.heal.refit.closed_form import require_healable
from billhook.heal.refit.divergence import divergence
from billhook.heal.refit.ridge import Moments, Solution, solve
from billhook.heal.refit.verdict import healed_and_cut
from billhook.heal.refit.widths import whole
from billhook.heal.refit.writes import NOT_ADDED, scale_of
from billhook.measure.batches import Batch, batches_of
from billhook.measure.patch import Forward, hooked
from billhook.measure.routing import Routing, said
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import Keep, Plan
from billhook.plan.record import Refit
from billhook.surgery.live import drops_of, keeps_of
from billhook.surgery.low_rank_experts import is_mixture
from billhook.surgery.narrow import inner_of, narrow

Progress = Callable[[str, int, int], None]
SWEEPS = 2  # over the experts of a mixture, each refitted to what the others leave
_SMALLEST = 1e-12


def merge(
    model: nn.Module,
    anatomy: Anatomy,
    plan: Plan | Iterable[Address],
    source: Windows | Iterable[Batch],
    progress: Progress | None = None,
) -> Healing:
    """Every expert that goes is merged into one that stays, and what is left is an ordinary mixture of fewer experts.

    Two streams walk through the stack, the dense one and that of the merged model. In each block with a mixture

    1. *groups*: an expert that goes joins the one that stays whose router logits are most like its own;
    2. *alignment and mean*: neurons are put in the order that agrees best with the one that stays, then the group is
       averaged, each expert weighted by how often it was picked (see ``alike``);
    3. *router*: the row of a group becomes the one whose logit is nearest to log sum exp of the logits of all its
       members, by least squares, so that a group is as likely as its members were together;
    4. *write*: the down projection of each merged expert is refitted by least squares to what the stream of the merged
       model lacks of the dense one, one expert after the other, twice.

    3 and 4 are kept where they lower the error behind the block on the last eighth of the windows, which no fit sees,
    and all of them together only if the whole model predicts more like the dense one there than with 1 and 2 alone (by
    ``divergence``).

    Source: M-SMoE (arXiv 2310.01334): 1 and 2. There the router keeps the rows of all experts and sends those of a
    group to the same weights, which no ordinary checkpoint can say: hence 3. There the merged model is trained further
    with the dense one as teacher: 4 stands for that.

    Where the plan takes the experts that stay apart as well (MC-SMoE), their neurons are put in the order in which a
    cut needs them between 3 and 4, those that write most first, and gate and up of the others become of low rank; down
    does so after 4 (and all of it where 3 and 4 are not kept). Each is the nearest of its rank on what it is given (see
    ``condense``), so the cut changes nothing more.

    Cost: the dense blocks once, those with fewer experts up to four times, for each merged expert an assignment of its
    neurons, and a regression on as many inputs as it has neurons. Memory: the model, two streams, and what the experts
    of one block are given. Raises InputError for plans that do more than take away experts of one stack and take those
    that stay apart, for experts that are laid out in a way that is not known, and for fewer than two windows.
    """
    require_no_channels(plan, "merging")
    keeps = {keep.unit: keep for keep in keeps_of(plan, anatomy)}
    names = {unit.stack for unit in keeps}
    factors = plan.factors if isinstance(plan, Plan) else ()
    ranks = {edit.unit: edit.rank for edit in factors if edit.unit in keeps and is_mixture(edit, anatomy)}
    merges = len(names) == 1 and all(keep.inner == "expert" for keep in keeps.values())
    if drops_of(plan, anatomy) or not merges or len(ranks) != len(factors):
        raise InputError(
            "merging takes a plan that takes away experts of one stack and at most takes apart those that stay"
        )
    require_healable(anatomy)
    for keep in keeps.values():
        neuron_axes(model, mixture_of(inner_of(anatomy, keep)))
    stack = anatomy.stack(names.pop())
    walk = _Walk(model, anatomy, Spans(model, stack, list(batches_of(source, model))), ranks)
    for number, block in enumerate(stack.blocks):
        walk.through(block, next((keeps[s.address] for s in block.sublayers if s.address in keeps), None))
        if progress is not None:
            progress("merging", number + 1, len(stack.blocks))
    tokens = sum(stream.shape[0] * stream.shape[1] for stream in walk.dense)
    merged, refitted = (whole(model, anatomy, keeps.values(), tensors) for tensors in (walk.plain, walk.tensors))
    found = Healing(refitted, tuple(walk.refits), walk.left, tokens, walk.spans.work)
    undone = tuple(refit.model_copy(update={"after": refit.before, "penalty": None}) for refit in walk.refits)
    plain = replace(found, tensors=merged, refits=undone)
    narrower = Plan.of([], keeps=keeps.values())
    narrower = narrower.model_copy(update={"edits": (*narrower.edits, *factors)})
    changes = [healed_and_cut(model, anatomy, narrower, healing) for healing in (plain, found)]
    before, after = divergence(walk.spans, anatomy, walk.held, changes)
    return found if after < before else plain


class _Walk:
    """The two streams, and what has been found so far, ``plain`` without refits; the model is changed in calls only."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, spans: Spans, ranks: Mapping[Address, int]) -> None:
        self.model, self.anatomy, self.spans, self.ranks = model, anatomy, spans, ranks
        self.dense = self.merged = [spans.enter(i) for i in range(len(spans.batches))]
        self.held = held_back([len(stream) for stream in self.dense])
        self.plain: dict[str, Tensor] = {}
        self.tensors: dict[str, Tensor] = {}
        self.refits: list[Refit] = []
        self.left: dict[str, str] = {}

    def through(self, block: Block, keep: Keep | None) -> None:
        number = block.address.block
        if keep is None:
            same = self.merged is self.dense
            self.dense = self._run(number, self.dense)
            self.merged = self.dense if same else self._run(number, self.merged)
            return
        mixture = mixture_of(inner_of(self.anatomy, keep))
        heard: list[tuple[Tensor, Tensor]] = []
        router = self.model.get_submodule(mixture.router)

        def listen(module: nn.Module, args: object, kwargs: object, output: object) -> None:
            logits, _, picked = said(output, mixture.router)
            heard.append((logits, picked))

        ahead = self._run(number, self.dense, [(router, listen)])
        undo = Undo()
        try:
            self.merged = self._merged(number, keep, mixture, heard, ahead, undo)
        finally:
            undo.restore()
        self.dense = ahead

    def _run(self, number: int, streams: list[Tensor], hooks: Iterable[tuple[nn.Module, Forward]] = ()) -> list[Tensor]:
        with hooked(hooks):
            return [self.spans.run(i, [number], stream) for i, stream in enumerate(streams)]

    def _merged(
        self,
        number: int,
        keep: Keep,
        mixture: Mixture,
        heard: list[tuple[Tensor, Tensor]],
        ahead: list[Tensor],
        undo: Undo,
    ) -> list[Tensor]:
        """The stream of the merged model behind this block."""
        real = [self.spans.real(i, stream).reshape(-1) for i, stream in enumerate(ahead)]
        routed = [Routing.of(logits[r], picked[r]) for (logits, picked), r in zip(heard, real, strict=True)]
        routing = sum(routed[1:], routed[0])
        groups = grouped(routing, keep.indices)
        old = {name: self.model.get_parameter(name).detach() for name in mixture.tensors}
        for name, tensor in averaged(old, neuron_axes(self.model, mixture), groups, routing.slots).items():
            put(self.model, name, tensor, undo)
        narrow(self.model, self.anatomy, [keep], undo.set)
        names = (*mixture.tensors, mixture.rows[0])
        rank = self.ranks.get(keep.unit)
        tried = Undo()
        if rank is not None:
            self._condense(number, mixture, lambda e, x, h: low_reads(foremost(e, h), x, rank), tried)
            self._condense(number, mixture, lambda e, x, h: low_writes(e, h, rank), tried)
        self.plain |= {name: self.model.get_parameter(name).detach() for name in names}
        tried.restore()
        wanted = [torch.stack([logits[:, m].float().logsumexp(-1) for m in groups.values()], 1) for logits, _ in heard]
        self._route(number, mixture, wanted, ahead, undo)
        if rank is not None:
            self._condense(number, mixture, lambda e, x, h: low_reads(foremost(e, h), x, rank), undo)
        after = self._write(number, mixture, ahead, undo)
        if rank is not None:
            after = self._condense(number, mixture, lambda e, x, h: low_writes(e, h, rank), undo)
        self.tensors |= {name: self.model.get_parameter(name).detach() for name in names}
        return after

    def _condense(
        self, number: int, mixture: Mixture, how: Callable[[Expert, Tensor, Tensor], Expert], undo: Undo
    ) -> list[Tensor]:
        """Every expert replaced by what ``how`` makes of it, of what it is given and of the values of its neurons, each
        times the weight of the expert for that token. The stream behind the block as it is then."""
        module: Any = self.model.get_submodule(mixture.experts)
        given: list[tuple[Tensor, ...]] = []
        self._run(number, self.merged, [(module, lambda module, args, kwargs, output: given.append(args))])
        real = [self.spans.real(i, stream).reshape(-1) for i, stream in enumerate(self.merged)]
        gate_up, down = (weight.detach().clone() for weight in gated(module))
        for expert in range(len(down)):
            x = []
            for (hidden, picked, weights), rows in zip(given, real, strict=True):
                tokens, slots = ((picked == expert) & rows[:, None]).nonzero(as_tuple=True)
                x.append((hidden[tokens], weights[tokens, slots, None].float()))
            tokens, shares = (torch.cat(parts) for parts in zip(*x, strict=True))
            values = neuron_values(module, expert, tokens).float() * shares
            new = how(Expert(gate_up[expert], down[expert]), tokens.float() * shares, values)
            gate_up[expert], down[expert] = new.gate_up, new.down
        put(self.model, f"{mixture.experts}.{GATE_UP}", gate_up, undo)
        put(self.model, f"{mixture.experts}.{DOWN}", down, undo)
        return self._run(number, self.merged)

    def _route(self, number: int, mixture: Mixture, wanted: list[Tensor], ahead: list[Tensor], undo: Undo) -> None:
        """New rows of the router, where the stream behind the block is nearer to the dense one with them."""
        router, name = self.model.get_submodule(mixture.router), mixture.rows[0]
        given: list[Tensor] = []
        before = self._off(self._run(number, self.merged, [(router, _keeping(given))]), ahead)
        rows = self.model.get_parameter(name).detach()
        fit, held = Moments(), Moments()
        for i, (x, goal) in enumerate(zip(given, wanted, strict=True)):
            x = x.reshape(len(goal), -1)
            lacks = goal - x.float() @ rows.float().T
            for moments, chosen in self._split(i, ahead[i], (fit, held)):
                moments.add(x[chosen], lacks[chosen], torch.ones_like(lacks[chosen][:, 0]))
        found = solve(fit, held)
        after, taken = before, None
        if found is not None:
            tried = Undo()
            put(self.model, name, (rows.float() + found.change.T).to(rows.dtype), tried)
            after = self._off(self._run(number, self.merged), ahead)
            if after < before:
                undo.then(tried.restore)
                taken = found.penalty
            else:
                tried.restore()
        self.refits.append(Refit(weight=name, before=before, after=min(before, after), penalty=taken))

    def _write(self, number: int, mixture: Mixture, ahead: list[Tensor], undo: Undo) -> list[Tensor]:
        """The stream behind the block with new down projections, and these in the model."""
        module, name = self.model.get_submodule(mixture.experts), f"{mixture.experts}.{DOWN}"
        given: list[tuple[Tensor, ...]] = []
        hook = [(module, lambda module, args, kwargs, output: given.append(args))]
        after = self._run(number, self.merged, hook)
        scale = scale_of(lambda hook: self._run(number, self.merged[:1], [] if hook is None else [(module, hook)])[0])
        before = self._off(after, ahead)
        if scale is None:
            self.left[name] = NOT_ADDED
            return after
        down = self.model.get_parameter(name).detach().clone()
        penalties = []
        for _ in range(SWEEPS):
            for expert in range(len(down)):
                found = self._expert(module, expert, given, after, ahead)
                if found is not None:
                    down[expert] += (found.change / scale).T.to(down.dtype)
                    penalties.append(found.penalty)
        put(self.model, name, down, undo)
        after = self._run(number, self.merged)
        penalty = max(penalties, default=None)
        self.refits.append(Refit(weight=name, before=before, after=self._off(after, ahead), penalty=penalty))
        return after

    def _expert(
        self, module: nn.Module, expert: int, given: list[tuple[Tensor, ...]], after: list[Tensor], ahead: list[Tensor]
    ) -> Solution | None:
        """The change of one expert's write, which is added to the streams ``after`` in place."""
        fit, held = Moments(), Moments()
        inputs = []
        for i, (hidden, picked, weights) in enumerate(given):
            tokens, slots = (picked == expert).nonzero(as_tuple=True)
            h = neuron_values(module, expert, hidden[tokens]).float() * weights[tokens, slots].float()[:, None]
            inputs.append((tokens, h))
            goal = ahead[i].reshape(-1, ahead[i].shape[-1])[tokens].float()
            lacks = goal - after[i].reshape(-1, goal.shape[-1])[tokens].float()
            energy = goal.square().sum(-1).clamp(min=_SMALLEST)
            for moments, chosen in self._split(i, ahead[i], (fit, held)):
                moments.add(h[chosen[tokens]], lacks[chosen[tokens]], 1 / energy[chosen[tokens]])
        if not fit.tokens or not held.tokens:
            return None
        found = solve(fit, held)
        if found is not None:
            for i, (tokens, h) in enumerate(inputs):
                step = (h @ found.change).to(after[i].dtype)
                after[i] = after[i].reshape(-1, step.shape[-1]).index_add(0, tokens, step).reshape(after[i].shape)
        return found

    def _split(self, i: int, stream: Tensor, pair: tuple[Moments, Moments]) -> list[tuple[Moments, Tensor]]:
        """Which tokens of a batch, flattened, are fitted on, and which are held back."""
        real, back = self.spans.real(i, stream), self.held[i].to(stream.device)[:, None]
        return [(pair[0], (real & ~back).reshape(-1)), (pair[1], (real & back).reshape(-1))]

    def _off(self, now: list[Tensor], ahead: list[Tensor]) -> float:
        """The mean squared error over the tokens held back, each relative to the dense stream."""
        total, count = 0.0, 0
        for i, (one, goal) in enumerate(zip(now, ahead, strict=True)):
            rows = self.spans.real(i, goal) & self.held[i].to(goal.device)[:, None]
            goal, lacks = goal[rows].float(), (goal - one)[rows].float()
            energy = goal.square().sum(-1).clamp(min=_SMALLEST)
            total += (lacks.square().sum(-1) / energy).sum(dtype=torch.float64).item()
            count += int(rows.sum())
        return total / max(count, 1)


def _keeping(given: list[Tensor]) -> Forward:
    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: object, output: object) -> None:
        given.append(args[0])

    return hook
