"""The loss of a language model as a function of how far each unit is let through, and its slopes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy.stubs import STUBS
from billhook.anatomy.types import Anatomy, Sublayer
from billhook.anatomy.undo import frozen
from billhook.data import Windows
from billhook.measure.patch import Forward, hooked, overridden, silencers, stream_in, stream_out
from billhook.measure.stand_ins import Nothing, StandIn
from billhook.plan.address import Address
from billhook.plan.errors import InputError


class Gates:
    """Every unit (a block or a sublayer) adds gate x what it adds to the stream: 1 as it is, 0 as if it were dropped.

    All slopes d loss / d gate come from one forward and one backward pass, so that what 60 units do is known for the
    price of two. Loss: mean negative log-likelihood of the next token, nats. One call looks at one window; the weights
    are fixed, the model is changed within calls only. With a ``stand_in`` (see ``measure.stand_ins``) its small
    weights are trained by each call of ``slopes``, one step of Adam.

    ``work`` counts block-token forwards; a backward pass counts as one forward more (weights get no gradient), a block
    that does not run as none.
    Memory: one window's activations in all blocks, and three times its logits.
    """

    def __init__(
        self,
        model: Any,
        anatomy: Anatomy,
        windows: Windows,
        units: Sequence[Address],
        stand_in: StandIn | None = None,
        rate: float = 1e-3,
    ) -> None:
        """Raises InputError if the model does not predict the next token of its own inputs."""
        stack = anatomy.stack(units[0].stack)
        if anatomy.head is None or not stack.causal or model.config.is_encoder_decoder:
            raise InputError(f"gates are trained on next tokens, which this {anatomy.family} model does not predict")
        self.model, self.anatomy, self.units = model, anatomy, tuple(units)
        self.windows = len(windows.ids)
        self.work = 0
        self._ids = windows.ids.to(next(model.parameters()).device)
        self._blocks = stack.blocks
        self._stand_in = stand_in or Nothing()
        self._rate, self._adam = rate, torch.optim.Adam([torch.zeros(())], lr=rate)
        self._begun = False

    def loss(self, gates: Mapping[Address, float], window: int) -> float:
        """The loss on a window (numbers wrap around) with these gates; those not given are 1. Sublayers that are shut
        do not run, where a module of their own holds them."""
        shut = {unit for unit in self.units if gates.get(unit) == 0}
        within = [s for b in self._blocks for s in b.sublayers if {b.address, s.address} & shut and _is_module(s)]
        with torch.no_grad(), overridden(silencers(self.model, within)):
            value, _ = self._forward(gates, window)
        silent = {sublayer.address for sublayer in within}
        self._count(1, sum(any(s.address not in silent for s in block.sublayers) for block in self._blocks))
        return value.item()

    def slopes(self, gates: Mapping[Address, float], window: int) -> tuple[float, dict[Address, float]]:
        """The loss on a window, and for each unit d loss / d gate there: what letting it through further would add.

        Raises InputError where they are not finite.
        """
        with torch.enable_grad():
            value, given = self._forward(gates, window)
            value.backward()  # type: ignore[no-untyped-call]
        self._count(2, len(self._blocks))
        slopes = {unit: gate.grad.item() for unit, gate in given.items() if gate.grad is not None}
        if not (value.isfinite() and all(slope - slope == 0 for slope in slopes.values())):
            raise InputError("the loss or its slopes are not finite: the weights or the calibration are damaged")
        self._learn()
        return value.item(), slopes

    def _forward(self, gates: Mapping[Address, float], window: int) -> tuple[Tensor, dict[Address, Tensor]]:
        ids = self._ids[window % self.windows][None]
        given = {unit: torch.tensor(gates.get(unit, 1.0), requires_grad=True, device=ids.device) for unit in self.units}
        hooks = [*self._stand_in.hooks(self.model, self.anatomy, given)]
        hooks += [self._gated(unit, gate) for unit, gate in given.items()]
        with frozen(self.model), hooked(hooks):
            logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1]
            return nn.functional.cross_entropy(logits.float(), ids[0, 1:]), given

    def _gated(self, unit: Address, gate: Tensor) -> tuple[nn.Module, Forward]:
        """The hook on the module that hands on what the unit writes."""
        if unit.sublayer is None:
            path, without = self.anatomy.block(unit).path, stream_in
        else:
            sublayer = self.anatomy.sublayer(unit)
            path = sublayer.output
            stub = next(cut.stub for cut in sublayer.cuts if cut.path == path)
            without = STUBS[stub]().forward if sublayer.adds_residual else _nothing

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            stream = gate * stream_out(output) + (1 - gate) * stream_out(without(*args, **kwargs))
            stream = stream + self._stand_in.instead(unit, gate, stream)
            return (stream, *output[1:]) if isinstance(output, tuple) else stream

        return self.model.get_submodule(path), hook

    def _learn(self) -> None:
        """One step of the stand-in's weights, which come into being with the first pass."""
        weights = self._stand_in.weights
        if not weights:
            return
        if not self._begun:
            self._adam, self._begun = torch.optim.Adam(weights, lr=self._rate), True
        self._adam.step()
        self._adam.zero_grad()

    def _count(self, passes: int, blocks: int) -> None:
        self.work += passes * blocks * self._ids.shape[1]


def _is_module(sublayer: Sublayer) -> bool:
    """Whether its stub stands for a module, and not for its linears one by one, to which stand-ins are hooked."""
    return not any(f"{cut.path}.weight" in sublayer.writes for cut in sublayer.cuts)


def _nothing(*args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros(())
