"""MLPs that run some of their neurons, others for each token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy
from billhook.anatomy.types import Inner, Slice
from billhook.anatomy.undo import Undo
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.runtime.silence import Forward, place


class Route:
    """Which expert each token of the present pass has."""

    def __init__(self) -> None:
        self._experts = torch.zeros(0, 0, dtype=torch.long)
        self._groups: dict[int, list[tuple[int, Tensor | None]]] = {}

    def set(self, experts: Tensor) -> None:
        """The number of each token's expert, [rows, tokens]."""
        self._experts, self._groups = experts, {}

    def groups(self, count: int) -> list[tuple[int, Tensor | None]]:
        """For each expert that is there its tokens, by their number in rows times tokens; None for all of them.

        ``count`` tokens are asked for: all of the pass, or the last ones of each row, since a model may drop the others
        once no later block reads keys and values of theirs.
        """
        if count not in self._groups:
            rows, tokens = self._experts.shape
            if not rows or count % rows or count > rows * tokens:
                raise InputError(f"{count} tokens reached an MLP in a pass of {rows} rows of {tokens}")
            flat = self._experts[:, tokens - count // rows :].reshape(-1)
            there = torch.unique(flat).tolist()
            whole = len(there) == 1
            self._groups[count] = [(e, None if whole else (flat == e).nonzero()[:, 0]) for e in there]
        return self._groups[count]


def neurons_of(anatomy: Anatomy) -> dict[Address, Inner]:
    """The neurons of each MLP of the decoder that has any, in order; those of a mixture's experts are none."""
    found = {a: u for a, units in anatomy.inner.items() for u in units if u.kind == "neuron" and a.stack == "decoder"}
    return {address: found[address] for address in sorted(found)}


def run_fewer(model: PreTrainedModel, neurons: Inner, kept: Tensor, route: Route, undo: Undo) -> None:
    """Let the linears of an MLP compute, for a token of expert e, the neurons ``kept``[e] alone, until ``undo`` is
    restored. ``kept`` is [experts, neurons kept], so that what stands between the linears works on one tensor.

    The weights of every expert are copied: its rows of the linears that read, its columns of the one that writes.
    InputError where a library keeps the weights elsewhere between calls, so that there is nothing to copy.
    """
    if any(model.get_parameter(s.parameter).is_meta for s in neurons.slices):
        raise InputError(
            "experts are copies of neurons, and the weights of this model are kept elsewhere between calls "
            "(offloaded); load it whole"
        )
    for path in dict.fromkeys(s.parameter.rpartition(".")[0] for s in neurons.slices):
        module = model.get_submodule(path)
        slices = [s for s in neurons.slices if s.parameter.rpartition(".")[0] == path]
        place(module, _linear(module, slices, kept, route), undo)


def _linear(module: nn.Module, slices: list[Slice], kept: Tensor, route: Route) -> Forward:
    weights = [s for s in slices if s.parameter.endswith(".weight")]
    biases = [s for s in slices if not s.parameter.endswith(".weight")]
    turned = (weights[0].axis == 1) != weights[0].writes  # a weight held as [inputs, outputs]
    weight, bias = module.get_parameter("weight").detach(), getattr(module, "bias", None)
    own: list[tuple[Tensor, Tensor | None]] = []
    for indices in kept:
        part = _part(weight, weights, indices)
        rest = bias if bias is None or not biases else _part(bias.detach(), biases, indices)
        own.append((part.T.contiguous() if turned else part, rest))

    def forward(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        groups = route.groups(len(flat))
        parts = [linear(flat if where is None else flat[where], *own[expert]) for expert, where in groups]
        if len(parts) > 1:
            parts = [torch.cat(parts)[torch.cat([where for _, where in groups if where is not None]).argsort()]]
        return parts[0].reshape(*x.shape[:-1], -1)

    return forward


def _part(tensor: Tensor, slices: list[Slice], kept: Tensor) -> Tensor:
    """The entries of the kept neurons, of each run of them where a tensor has several."""
    entries = torch.cat([s.start + kept for s in slices]).to(tensor.device)
    return tensor.index_select(slices[0].axis, entries)
