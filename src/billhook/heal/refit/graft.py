"""Neurons of MLPs that were dropped, grafted into one that stays: which of them, and with what weights."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor, nn

from billhook.anatomy.types import Sublayer
from billhook.heal.refit.places import Place
from billhook.heal.refit.pool import rows
from billhook.heal.refit.reads import reads_of
from billhook.heal.refit.ridge import Moments, solve
from billhook.plan.address import Address

PENALTY = 0.3  # relative to the mean energy of an input, while neurons are chosen
ROUNDS = 4
DONORS = 6  # MLPs of one gap; what they were given is held until the gap has been crossed
LARGEST = 6144  # neurons; the sums of two MLPs are (2n)^2, which wider ones pay with many gigabytes and minutes


def donors(model: nn.Module, places: list[Place], drops: Set[Address]) -> dict[Address, list[Sublayer]]:
    """For MLPs that stay the dropped ones whose neurons they may take, in the order of asking: all of a gap for the one
    before it, where nothing that stays lies between (up to ``DONORS``), and the last of a gap for the one after it, if
    the gap has more than that one."""
    found: dict[Address, list[Sublayer]] = {}
    before: Sublayer | None = None  # an MLP that stays, with nothing behind it that does
    run: list[Sublayer] = []
    for place in places:
        kept = place.kept(drops)
        gone = [s for s in place.sublayers if s not in kept and s.kind == "mlp"]
        stays = [s for s in kept if s.kind == "mlp"]
        if gone and before is not None and not place.acts(drops):
            lend = [mlp for mlp in gone if alike(model, before, mlp)]
            if lend and len(found.setdefault(before.address, [])) < DONORS:
                found[before.address] += lend
        run += gone
        for mlp in stays:
            if run and [run[-1]] not in found.values() and alike(model, mlp, run[-1]):
                found[mlp.address] = [run[-1]]
            run = []
        if place.acts(drops):
            before = stays[-1] if stays else None
    return found


def alike(model: nn.Module, one: Sublayer, other: Sublayer) -> bool:
    """Whether neurons can move from one MLP to the other: each is one row of one or two reads and one column of the
    write, nothing else belongs to it, sizes agree, and there are no more than ``LARGEST``."""
    sizes = _sizes(model, one)
    return sizes is not None and sizes == _sizes(model, other)


def choose(fit: Moments, held: Moments, prior: Tensor, own: int) -> Tensor | None:
    """Which of the neurons of two MLPs one of them should have; None where its own do as well on ``held``.

    ``fit`` and ``held`` hold the moments of the values of all 2 x ``own`` neurons, its own first (and perhaps of a
    constant 1 behind them), against what they should write together; ``prior`` [2 own, o] is what each writes now.
    Compared are ridge refits of the write of both choices.
    """
    always = len(fit.inputs) - len(prior)
    prior = torch.cat([prior, prior.new_zeros(always, prior.shape[1])])
    constant = torch.arange(len(prior) - always, len(prior), device=prior.device)
    chosen = survivors(fit, prior, own, always)
    errors = []
    for neurons in (chosen, torch.arange(own, device=prior.device)):
        inputs = torch.cat([neurons, constant])
        held_back = part(held, prior, inputs)
        solution = solve(part(fit, prior, inputs), held_back)
        errors.append(held_back.energy if solution is None else solution.error)
    return chosen if errors[0] < errors[1] else None


def survivors(fit: Moments, prior: Tensor, own: int, always: int) -> Tensor:
    """Which ``own`` of all neurons to keep, as indices in order. ``fit`` holds the moments of the values of all of them
    (and behind them ``always`` inputs that stay whatever happens) against what they should write together; prior
    [inputs, o] is what each writes now.

    With A = sum w h h' + p and W = A^-1 (sum w h r' + p prior), removing input j and refitting the others raises the
    error by |W[j]|^2 / (A^-1)[j, j] (the optimal brain surgeon: Hassibi and Stork 1993). The least are removed, a
    quarter of those too many at once, and the rest refitted: A^-1 and W of those left follow from both as they were.
    Cost: inputs^3 multiplications for the inverse, and (surplus / 4) x inputs^2 twice for each removal, float64.
    """
    a = fit.inputs.double()
    strength = PENALTY * a.diagonal().mean()
    a.diagonal().add_(strength)
    factor = torch.linalg.cholesky(a)
    weights = torch.cholesky_solve(fit.cross.double() + strength * prior.double(), factor)
    inverse = torch.cholesky_inverse(factor)
    alive = torch.arange(len(a), device=a.device)
    for left in range(ROUNDS, 0, -1):
        harm = weights.square().sum(-1) / inverse.diagonal()
        harm[len(alive) - always :] = float("inf")
        surplus = len(alive) - always - own
        order, many = harm.argsort(), -(-surplus // left)
        gone, stays = order[:many], order[many:].sort().values
        alive = alive[stays]
        if left == 1:
            break
        along = inverse[stays][:, gone]
        leaves = torch.linalg.cholesky(inverse[gone][:, gone])
        weights = weights[stays] - along @ torch.cholesky_solve(weights[gone], leaves)
        inverse = inverse[stays][:, stays] - along @ torch.cholesky_solve(along.T, leaves)
    return alive[alive < len(a) - always]


def part(moments: Moments, prior: Tensor, chosen: Tensor) -> Moments:
    """The moments of some of the inputs alone, against what they lack when each writes its ``prior`` [inputs, o]."""
    a, c, p = moments.inputs[chosen][:, chosen], moments.cross[chosen], prior[chosen]
    found = Moments()
    found.inputs, found.cross, found.tokens = a, c - a @ p, moments.tokens
    doubled = p.double()
    found.energy = moments.energy - ((2 * c.double() - a.double() @ doubled) * doubled).sum().item()
    return found


def _sizes(model: nn.Module, mlp: Sublayer) -> tuple[tuple[int, ...], ...] | None:
    """Shapes of all reads and the write, one neuron a row; None for an MLP of another kind."""
    reads = reads_of(model, mlp)
    if len(reads) not in (1, 2) or len(mlp.writes) != 1 or not mlp.writes[0].endswith(".weight"):
        return None
    write = model.get_submodule(mlp.writes[0].removesuffix(".weight"))
    if any(model.get_parameter(name).ndim != 2 for name in (*reads, *mlp.writes)):
        return None
    known = {name.rpartition(".")[0] for name in (*reads, *mlp.writes, *(f"{norm}." for norm in mlp.norms))}
    inside = model.get_submodule(mlp.module).named_parameters(prefix=mlp.module)
    if any(name.rpartition(".")[0] not in known for name, _ in inside):
        return None
    shapes = [tuple(t.shape) for read in reads.values() for t in rows(read).values()]
    outputs = rows(write)["weight"].shape
    if outputs[1] > LARGEST or any(shape[0] != outputs[1] for shape in shapes):
        return None
    return (*shapes, tuple(outputs))
