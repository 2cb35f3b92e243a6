"""The weights of a norm moved into the linears behind it, so that blocks with different norms can share a plain one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from billhook.anatomy.low_rank import as_kept
from billhook.anatomy.types import Block, Sublayer
from billhook.anatomy.undo import Undo
from billhook.heal.healing import put
from billhook.heal.pool import rows
from billhook.plan.errors import InputError

_PLAIN = (1.0, 0.0)  # what the weight of a norm is that does nothing more: 0 where the module adds 1 to it


def norm_before(block: Block, sublayer: Sublayer) -> str:
    """The one norm through which a sublayer reads the stream and behind which nothing else stands. InputError where
    norms are arranged otherwise."""
    norms = sublayer.norms or (block.norms if block.parallel else ())
    straight = all(weight.startswith(f"{sublayer.output}.") for weight in sublayer.writes)
    if len(norms) != 1 or not straight or (block.norms and not block.parallel):
        raise InputError(f"{sublayer.address} is not written to the stream as it is, or has no single norm before it")
    return norms[0]


@dataclass(frozen=True)
class Absorbed:
    """What a norm does beside normalising: ``gain`` g [hidden], and ``shift`` b [hidden] where it has one; in float32.
    ``plain`` are its parameters, by name in the model, when it does not do that."""

    gain: Tensor
    shift: Tensor | None
    plain: dict[str, Tensor]


def absorbed(model: nn.Module, block: Block, sublayer: Sublayer) -> Absorbed:
    """What the linears of a sublayer have to take up from its norm. InputError where they cannot: other norms than a
    single one before the reads, or a bias of the norm where linears have none."""
    path = norm_before(block, sublayer)
    norm = model.get_submodule(path)
    own = {name: parameter.detach() for name, parameter in norm.named_parameters()}
    if own.keys() - {"weight", "bias"}:
        raise InputError(f"{path} is a norm that is not understood")
    plain: dict[str, Tensor] = {}
    gain, shift = torch.ones(()), own.get("bias")
    if "weight" in own:
        value = _plain_weight(norm, path)
        gain = own["weight"].float() + (1 - value)
        plain[f"{path}.weight"] = torch.full_like(own["weight"], value)
    if shift is not None:
        plain[f"{path}.bias"] = torch.zeros_like(shift)
        shift = shift.float() if shift.any() else None
    for name in sublayer.reads if shift is not None else ():
        if getattr(model.get_submodule(name.rpartition(".")[0]), "bias", None) is None:
            raise InputError(f"{path} has a bias, and {name} has none to take it up")
    return Absorbed(gain, shift, plain)


def without_norm(model: nn.Module, block: Block, sublayer: Sublayer) -> dict[str, Tensor]:
    """New parameters, by name in the model, with which a sublayer computes the same behind a norm that only normalises:

        W (g * z + b) + c  =  (W diag(g)) z + (c + W b)

    for the normalised stream z, the gain g and bias b of the norm, and each linear W, c that reads. Products are taken
    in float32 and rounded once. InputError as for ``absorbed``.
    """
    taken = absorbed(model, block, sublayer)
    found = dict(taken.plain)
    for name in sublayer.reads:
        linear: Any = model.get_submodule(name.rpartition(".")[0])
        own = rows(linear)
        weight = own["weight"].float()
        new = (weight * taken.gain).to(own["weight"].dtype)
        found[name] = as_kept(linear, new)
        if taken.shift is not None:
            bias = own["bias"].float() + weight @ taken.shift
            found[f"{name.removesuffix('weight')}bias"] = bias.to(own["bias"].dtype)
    return found


def _plain_weight(norm: nn.Module, path: str) -> float:
    """Found out by trying: with it, what a norm puts out has mean square 1."""
    weight = norm.get_parameter("weight")
    probe = torch.ones_like(weight)
    probe[::2] = -1
    for value in _PLAIN:
        undo = Undo()
        try:
            for name, parameter in norm.named_parameters():
                put(norm, name, torch.full_like(parameter, value if name == "weight" else 0.0), undo)
            with torch.no_grad():
                energy = norm(probe[None, None]).float().square().mean().item()
        finally:
            undo.restore()
        if abs(energy - 1) < 0.05:
            return value
    raise InputError(f"{path} is a norm that is not understood")
