"""Which experts go together, and the mean of a group once their neurons stand in the same order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from billhook.measure.routing import Routing

Axes = Mapping[str, tuple[int, int]]  # of an expert's tensor: the axis of its neurons, and how many runs of them


def grouped(routed: Routing, kept: Iterable[int]) -> dict[int, list[int]]:
    """For each expert that stays those that form its group, itself first: every other one joins the one whose router
    logits are most like its own (cosine over tokens; of equals the first). Nobody joins one that was never picked,
    since nothing is known of it, unless all are such."""
    kept = list(kept)
    known = [leader for leader in kept if routed.slots[leader] > 0] or kept
    found = {leader: [leader] for leader in kept}
    for expert in range(len(routed.slots)):
        if expert not in found:
            found[known[int(routed.likeness[expert, known].argmax())]].append(expert)
    return found


def averaged(
    tensors: Mapping[str, Tensor], axes: Axes, groups: Mapping[int, list[int]], weights: Tensor
) -> dict[str, Tensor]:
    """The tensors of all experts [experts, ...] with the mean of its group, by ``weights`` [experts], in the place of
    each that stays; neurons are aligned with those of the one that stays first. A group without weight stays as is."""
    new = {name: tensor.clone() for name, tensor in tensors.items()}
    for leader, members in groups.items():
        own = weights[members]
        if len(members) == 1 or own.sum() == 0:
            continue
        target = {name: tensor[leader].float() for name, tensor in tensors.items()}
        total = {name: torch.zeros_like(tensor) for name, tensor in target.items()}
        for member, share in zip(members, (own / own.sum()).tolist(), strict=True):
            if share == 0:
                continue
            expert = {name: tensor[member].float() for name, tensor in tensors.items()}
            for name, tensor in aligned(expert, target, axes).items():
                total[name] += share * tensor
        for name, mean in total.items():
            new[name][leader] = mean.to(new[name].dtype)
    return new


def aligned(expert: Mapping[str, Tensor], target: Mapping[str, Tensor], axes: Axes) -> dict[str, Tensor]:
    """One expert with its neurons in the order in which their weights agree best with those of another: of all
    permutations the one with the largest sum over neurons of the products of gate, up and down (an assignment problem;
    for n neurons n^3 steps at most). It computes the same."""
    products = torch.stack([rows(target[name], *axes[name]) @ rows(expert[name], *axes[name]).T for name in expert])
    _, order = linear_sum_assignment(products.sum(0).double().cpu().numpy(), maximize=True)
    places = torch.from_numpy(order)
    found = {}
    for name, tensor in expert.items():
        axis, runs = axes[name]
        entries = torch.cat([places + run * len(places) for run in range(runs)])
        found[name] = tensor.index_select(axis, entries.to(tensor.device))
    return found


def rows(tensor: Tensor, axis: int, runs: int) -> Tensor:
    """What one expert's tensor holds of each neuron, side by side: [neurons, n]."""
    return torch.cat(torch.chunk(tensor.movedim(axis, 0), runs), dim=1)
