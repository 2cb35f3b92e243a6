"""Where the routers of mixtures send tokens: sums of one streaming pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy.mixtures import mixture_of
from billhook.anatomy.types import Anatomy, Block, Inner
from billhook.data import Windows
from billhook.measure.batches import Batch, batches_of, real_tokens
from billhook.measure.patch import Forward, Reached, hooked, observing, stream_in
from billhook.plan.address import Address
from billhook.plan.errors import InputError

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Routing:
    """Sums over ``count`` tokens for the E experts of one mixture, float64 on the CPU: ``slots`` [E], how often each
    was picked; ``logits`` [E, E], of the products of the router's logits for each pair. Parts of a calibration add
    up."""

    count: int
    slots: Tensor
    logits: Tensor

    @classmethod
    def of(cls, logits: Tensor, picked: Tensor) -> Routing:
        """Tokens [n, E], and the experts picked for each [n, k]."""
        rows = logits.double().cpu()
        slots = torch.bincount(picked.reshape(-1).cpu(), minlength=logits.shape[1]).double()
        return cls(len(rows), slots, rows.T @ rows)

    def __add__(self, other: Routing) -> Routing:
        return Routing(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def frequency(self) -> Tensor:
        """Each expert's share of all that were picked; adds up to one."""
        return self.slots / self.slots.sum()

    @property
    def likeness(self) -> Tensor:
        """The cosine between the logits of two experts over the tokens [E, E]."""
        norms = self.logits.diagonal().sqrt().clamp(min=1e-30)
        return self.logits / norms / norms[:, None]


def routing(
    model: nn.Module,
    anatomy: Anatomy,
    units: Mapping[Address, Inner],
    source: Windows | Iterable[Batch],
    progress: Progress | None = None,
) -> dict[Address, Routing]:
    """How the routers of these mixtures (their inner units of kind ``expert``) choose, over all tokens that are no
    padding. A mixture that the calibration never reached is not there.

    Cost: one forward pass up to the last block. Memory: what the routers of one block say of one batch. Raises
    InputError where a router says something else than logits, weights and indices, and if nothing is reached at all.
    """
    batches = list(batches_of(source, model))
    found: dict[Address, Routing] = {}
    for index, inputs in enumerate(batches):
        with observing(model), hooked(_hooks(model, anatomy, units, inputs, found)), suppress(Reached):
            model(**inputs)
        if progress is not None:
            progress("routing", index + 1, len(batches))
    if not found:
        raise InputError("the calibration reaches no mixture of experts")
    return found


def said(output: Any, router: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, experts], weights [n, k] and indices [n, k] in what a router returned."""
    if isinstance(output, tuple) and len(output) == 3:
        logits, weights, picked = output
        if not picked.is_floating_point() and weights.shape == picked.shape and len(logits) == len(picked):
            return logits, weights, picked
    raise InputError(f"{router} does not return logits, weights and the indices of experts")


def _hooks(
    model: nn.Module,
    anatomy: Anatomy,
    units: Mapping[Address, Inner],
    inputs: Mapping[str, Any],
    found: dict[Address, Routing],
) -> Iterator[tuple[nn.Module, Forward]]:
    heard: dict[Address, tuple[Tensor, Tensor]] = {}  # of the block that is running
    last = {stack.name: stack.blocks[-1] for stack in anatomy.stacks}
    ahead = {address.stack for address in units}

    def listen(address: Address, router: str) -> Forward:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            logits, _, picked = said(output, router)
            heard[address] = (logits, picked)

        return hook

    def after(block: Block) -> Forward:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            stack = block.address.stack
            real = real_tokens(inputs, stack, stream_in(*args, **kwargs)).reshape(-1)
            for address, (logits, picked) in heard.items():
                if not torch.isfinite(logits[real]).all():
                    raise InputError(f"the router of {address} gives NaN or infinite values: its weights are damaged")
                part = Routing.of(logits[real], picked[real])
                found[address] = found[address] + part if address in found else part
            heard.clear()
            if block is last[stack]:
                ahead.discard(stack)
            if not ahead:
                raise Reached

        return hook

    for address, inner in units.items():
        router = mixture_of(inner).router
        yield model.get_submodule(router), listen(address, router)
    for stack in anatomy.stacks:
        if stack.name in ahead:
            for block in stack.blocks:
                yield model.get_submodule(block.path), after(block)
