"""Experts of neurons, and the router that picks among them before the first block: found on text."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy
from billhook.anatomy.types import Inner
from billhook.anatomy.undo import Undo, frozen
from billhook.data import Windows
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.runtime.silence import Forward, place, stream_in

ROWS = 8
DAMPING = 1e-2


@dataclass(frozen=True)
class Experts:
    """A router and its experts, float32: ``weight`` [experts, hidden] and ``bias`` [experts], and for each MLP how much
    each neuron is worth to the tokens of each expert, ``worth`` [experts, neurons]."""

    weight: Tensor
    bias: Tensor
    worth: dict[Address, Tensor]

    def picked(self, stream: Tensor) -> Tensor:
        """The expert of each token of a stream into the first block [..., hidden]: its number, [...]."""
        return (normed(stream) @ self.weight.to(stream.device).T + self.bias.to(stream.device)).argmax(-1)

    @property
    def sizes(self) -> dict[Address, int]:
        """How many neurons each MLP has."""
        return {address: worth.shape[1] for address, worth in self.worth.items()}

    def kept(self, address: Address, keep: float) -> Tensor:
        """The neurons of each expert, the share ``keep`` that is worth most, rising: [experts, kept]."""
        return _best(self.worth[address], keep)

    def tensors(self) -> dict[str, Tensor]:
        router = {"router.weight": self.weight, "router.bias": self.bias}
        return router | {f"{address}.worth": worth for address, worth in self.worth.items()}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Self:
        """From such tensors. InputError for any others."""
        weight, bias = (tensors.get(f"router.{part}") for part in ("weight", "bias"))
        named = {name: tensor for name, tensor in tensors.items() if name.endswith(".worth")}
        found = [t for t in (weight, bias, *named.values()) if t is not None]
        fits = [t.ndim for t in found] == [2, 1, *[2] * len(named)] and len({len(t) for t in found}) == 1
        if weight is None or bias is None or not fits or len(found) != len(tensors):
            raise InputError(
                "policy neuron-experts: its tensors must be router.weight [experts, hidden], router.bias [experts] and "
                "for each MLP worth [experts, neurons]"
            )
        return cls(weight, bias, {Address.parse(name.rpartition(".")[0]): t for name, t in named.items()})


def left(neurons: int, keep: float) -> int:
    """How many of so many neurons a share is; at least one."""
    return max(1, round(keep * neurons))


def _best(worth: Tensor, keep: float) -> Tensor:
    order = worth.argsort(dim=1, descending=True, stable=True)
    return order[:, : left(worth.shape[1], keep)].sort(dim=1).values


def normed(stream: Tensor) -> Tensor:
    """x / rms(x), float32: each token counts alike, however large its stream."""
    x = stream.float()
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def find_experts(
    model: PreTrainedModel,
    anatomy: Anatomy,
    neurons: dict[Address, Inner],
    windows: Windows,
    *,
    count: int,
    keep: float,
    seed: int = 0,
) -> Experts:
    """So many experts of the plain model's neurons, and the router of a token to the one that keeps most of it.

    1. Tokens are put into ``count`` groups by k-means on their streams into the first block, each over its rms.
    2. What neuron j is worth to a group is the root of the mean square of its activation a_j there, times the norm of
       the column by which it writes; each group's expert keeps the share ``keep`` of every MLP that is worth most.
    3. What an expert is worth to a token is its share of sum_j (a_j |w_j|)^2 over the neurons of an MLP, averaged over
       MLPs. The router predicts it, less its mean over experts, from the stream of step 1: ridge regression, the ridge
       ``DAMPING`` times the mean of the diagonal of the second moments, float64.
    4. Step 2 once more, with the groups that the router makes.

    Cost: four passes over the windows, k-means and a system of the hidden size; memory for the first stream of all
    tokens, and for two numbers a neuron and expert. The same seed gives the same experts. InputError for a model that
    does not read text alone, for fewer tokens than experts, and where activations are not finite.
    """
    if model.config.is_encoder_decoder:
        raise InputError(
            "experts of neurons are found on text that a decoder reads alone, which no encoder-decoder does"
        )
    if windows.tokens < count:
        raise InputError(f"{count} experts are found on as many tokens or more, not on {windows.tokens}")
    reading = _Reading(model, anatomy, neurons, windows)
    with frozen(model), torch.no_grad():
        points = reading.streams()
        features = torch.cat([points, torch.ones(len(points), 1)], dim=1)
        worth = reading.worth(_groups(points, count, seed), count)
        shares = reading.shares({address: _best(each, keep) for address, each in worth.items()})
        router = _ridge(features, shares - shares.mean(1, keepdim=True)).T
        worth = reading.worth((features @ router.T).argmax(1), count)
    return Experts(router[:, :-1].contiguous(), router[:, -1].contiguous(), worth)


class _Reading:
    """The plain model on the windows, watched where the first block and the writing linears take their input."""

    def __init__(
        self, model: PreTrainedModel, anatomy: Anatomy, neurons: dict[Address, Inner], windows: Windows
    ) -> None:
        self._model, self._windows = model, windows
        self._first = anatomy.stack("decoder").blocks[0].path
        self._writes = {a: next(s for s in inner.slices if s.writes) for a, inner in neurons.items()}
        self._count = {address: inner.count for address, inner in neurons.items()}

    def streams(self) -> Tensor:
        """Into the first block, over their rms, [tokens, hidden]."""
        found: list[Tensor] = []
        self._read({self._first: lambda stream, at: found.append(normed(stream).flatten(0, 1).cpu())})
        return torch.cat(found)

    def worth(self, groups: Tensor, count: int) -> dict[Address, Tensor]:
        """For each MLP, of the tokens of each group the root mean square of a_j |w_j|; of all tokens, where a group has
        none."""
        member = torch.nn.functional.one_hot(groups, count).float()
        member[:, member.sum(0) == 0] = 1.0
        share = member / member.sum(0)
        squares = {a: torch.zeros(count, n, dtype=torch.float64) for a, n in self._count.items()}

        def summed(address: Address) -> Callable[[Tensor, slice], None]:
            def see(activation: Tensor, at: slice) -> None:
                a = activation.flatten(0, -2).float()
                squares[address] += (share[at].T.to(a.device) @ a.square()).cpu()

            return see

        self._read({self._linear(address): summed(address) for address in self._writes})
        for address, total in squares.items():
            if not bool(total.isfinite().all()):
                raise InputError(f"activations of {address} are not finite: the weights or the text are damaged")
        return {a: (total.sqrt() * self._norms(a)).float() for a, total in squares.items()}

    def shares(self, kept: dict[Address, Tensor]) -> Tensor:
        """Of sum_j (a_j |w_j|)^2 of a token, the share of the neurons that each expert keeps, averaged over MLPs:
        [tokens, experts]."""
        experts = len(next(iter(kept.values())))
        found = torch.zeros(self._windows.tokens, experts)

        def compared(address: Address) -> Callable[[Tensor, slice], None]:
            chosen = torch.zeros(self._count[address], experts).scatter_(0, kept[address].T, 1.0)
            norms = self._norms(address)

            def see(activation: Tensor, at: slice) -> None:
                energy = (activation.flatten(0, -2).float() * norms.to(activation.device)).square()
                whole = energy.sum(1, keepdim=True).clamp(min=1e-30)
                found[at] += (energy @ chosen.to(energy.device) / whole).cpu() / len(kept)

            return see

        self._read({self._linear(address): compared(address) for address in self._writes})
        return found

    def _linear(self, address: Address) -> str:
        return self._writes[address].parameter.rpartition(".")[0]

    def _norms(self, address: Address) -> Tensor:
        """Of what each neuron writes, by activation: [neurons]."""
        column = self._writes[address]
        weight = self._model.get_parameter(column.parameter).detach().float()
        norms: Tensor = torch.linalg.vector_norm(weight, dim=1 - column.axis)
        return norms.cpu()

    def _read(self, watched: dict[str, Callable[[Tensor, slice], None]]) -> None:
        """One pass; each watcher gets what its module is given, and which tokens these are."""
        length = self._windows.ids.shape[1]
        undo, at = Undo(), slice(0, 0)

        def watching(original: Forward, see: Callable[[Tensor, slice], None]) -> Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                see(stream_in(*args, **kwargs), at)
                return original(*args, **kwargs)

            return forward

        try:
            for path, see in watched.items():
                module = self._model.get_submodule(path)
                place(module, watching(module.forward, see), undo)
            for ids in torch.split(self._windows.ids, ROWS):
                at = slice(at.stop, at.stop + len(ids) * length)
                self._model(input_ids=ids.to(self._model.device), use_cache=False)
        finally:
            undo.restore()


def _groups(points: Tensor, count: int, seed: int) -> Tensor:
    """k-means on points [n, d]: the number of each one's group, [n]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a group that comes out empty, as with fewer kinds of token than groups
        _, found = kmeans2(points.numpy(), count, minit="++", rng=np.random.default_rng(seed))
    return torch.from_numpy(found).long()


def _ridge(features: Tensor, targets: Tensor) -> Tensor:
    """Of features [n, d] and targets [n, e] the weights [d, e] of the damped least squares."""
    moments = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    cross = torch.zeros(features.shape[1], targets.shape[1], dtype=torch.float64)
    for f, t in zip(torch.split(features, 4096), torch.split(targets, 4096), strict=True):
        moments += f.double().T @ f.double()
        cross += f.double().T @ t.double()
    moments += DAMPING * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
    solution: Tensor = torch.linalg.solve(moments, cross)
    return solution.float()
