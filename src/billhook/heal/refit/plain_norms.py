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
from billhook.heal.refit.pool import rows
from billhook.plan.errors import InputError

_PLAIN = (1.0, 0.0)  # what the weight of a norm is that does nothing more: 0 where the module adds 1 to it


def read_through(block: Block, sublayer: Sublayer) -> str | None:
    """The one norm through which a sublayer reads the stream; None where there is none, as where norms stand behind the
    writes only, or on the stream itself."""
    norms = sublayer.norms or (block.norms if block.parallel else ())
    before = [norm for norm in norms if norm != sublayer.output]
    return before[0] if len(before) == 1 else None


def norm_before(block: Block, sublayer: Sublayer) -> str:
    """The norm through which a sublayer reads the stream, if nothing stands behind the writes. InputError where norms
    are arranged otherwise."""
    path = read_through(block, sublayer)
    straight = all(weight.startswith(f"{sublayer.output}.") for weight in sublayer.writes)
    if path is None or not straight or (block.norms and not block.parallel):
        raise InputError(f"{sublayer.address} is not written to the stream as it is, or has no single norm before it")
    return path


def gain_of(norm: nn.Module) -> Tensor | None:
    """What a norm multiplies the normalised stream with, [hidden] in float32, however its weight says it; None for one
    that is not understood."""
    weight = getattr(norm, "weight", None)
    if weight is None:
        return None
    value = _plain_weight(norm)
    return None if value is None else weight.detach().float() + (1 - value)


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
        value = _plain_weight(norm)
        if value is None:
            raise InputError(f"{path} is a norm that is not understood")
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


def _plain_weight(norm: nn.Module) -> float | None:
    """Found out by trying: with it, what a norm puts out has mean square 1. None where neither does that."""
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
    return None
