"""How the output would answer if inner units were turned down: one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from billhook.anatomy.types import Anatomy, Inner
from billhook.data import Windows
from billhook.data.sampling import drawn
from billhook.measure.batches import Batch, batches_of
from billhook.measure.patch import Forward, hooked, observing
from billhook.plan.address import Address
from billhook.plan.errors import InputError

Progress = Callable[[str, int, int], None]
Answer = Literal["loss", "entropy", "sampled"]
_CHUNK = 256


@dataclass(frozen=True)
class Slopes:
    """Of each of n inner units the slope a at a token, the sum over its channels h of h dL/dh: by how much L falls, to
    first order, if the unit falls silent there. Sums over ``count`` tokens, float64 [n] on the CPU: ``total`` of a,
    ``absolute`` of |a|, ``squares`` of a^2, and ``texts`` of |the sum of a over one text|. Parts add up."""

    count: int
    total: Tensor
    absolute: Tensor
    squares: Tensor
    texts: Tensor

    @classmethod
    def of(cls, a: Tensor, real: Tensor) -> Slopes:
        """Slopes [texts, tokens, n], of which those count where ``real`` [texts, tokens]."""
        a = (a.float() * real[..., None]).double()
        text = a.sum(1)
        sums = (text.sum(0), a.abs().sum((0, 1)), a.square().sum((0, 1)), text.abs().sum(0))
        return cls(int(real.sum()), *(s.cpu() for s in sums))

    def __add__(self, other: Slopes) -> Slopes:
        return Slopes(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def sensitivity(
    model: nn.Module,
    anatomy: Anatomy,
    units: Mapping[Address, Inner],
    source: Windows | Iterable[Batch],
    answer: Answer = "loss",
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[Address, Slopes]:
    """The slopes of the inner units of these sublayers, for L the sum over tokens of

    - ``loss``: the negative log-likelihood of the text;
    - ``entropy``: the entropy of the model's own next-token distribution;
    - ``sampled``: the negative log-likelihood of tokens drawn from the model's own distribution (with ``seed``), whose
      expected square is the Fisher information of a gate before the unit, and so the second derivative of the
      divergence from the dense model (taking what different tokens tell for independent).

    Cost: a forward pass with head and a backward pass to the activations, without gradients of weights: about three
    forward passes. Memory: the activations of one window. Raises InputError for a model that gives no logits of next
    tokens, and where a slope is not finite.
    """
    if anatomy.embedding is None or anatomy.head is None:
        raise InputError(f"slopes need a language model; this {anatomy.family} model has no embedding or no head")
    batches = list(batches_of(source, model, tokens_at_once=1))
    generator = torch.Generator().manual_seed(seed)
    writes = {a: [s for s in inner.slices if s.writes] for a, inner in units.items()}
    names = sorted({s.parameter for slices in writes.values() for s in slices})
    linears = {name: model.get_submodule(name.removesuffix(".weight")) for name in names}
    found: dict[Address, Slopes] = {}
    for index, inputs in enumerate(batches):
        given: dict[str, Tensor] = {}
        hooks = [(model.get_submodule(anatomy.embedding), _needing_gradient)]
        hooks += [(linear, keeping(given, name)) for name, linear in linears.items()]
        with observing(model), hooked(hooks), torch.enable_grad():
            logits = model(**inputs).logits
            ids = inputs["input_ids"]
            real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
            towards = _towards(answer, logits.detach(), ids, real, generator)
            gradients = torch.autograd.grad(logits, list(given.values()), towards)
        products = {n: x.detach().float() * g.float() for (n, x), g in zip(given.items(), gradients, strict=True)}
        for address, inner in units.items():
            own = [of_units(products[s.parameter], s.start, s.width, inner.count) for s in writes[address]]
            slopes = Slopes.of(torch.stack(own).sum(0).reshape(*real.shape, -1), real)
            if not torch.isfinite(slopes.squares).all():
                raise InputError(f"the slopes of {address} are not finite: weights or inputs are damaged")
            found[address] = found[address] + slopes if address in found else slopes
        if progress is not None:
            progress("slopes", index + 1, len(batches))
    return found


def of_units(product: Tensor, start: int, width: int, count: int) -> Tensor:
    """The sum over the channels of each unit: [..., channels] to [..., count]."""
    own = product[..., start : start + count * width]
    return own.reshape(*own.shape[:-1], count, width).sum(-1)


def _towards(answer: Answer, logits: Tensor, ids: Tensor, real: Tensor, generator: torch.Generator) -> Tensor:
    """dL/dlogits [texts, tokens, vocabulary], with the next token where there is one; a few positions at a time, since
    their float32 probabilities are large. Cross-entropy: p - onehot; entropy H: -p (log p + H)."""
    result = torch.zeros_like(logits)
    counts = real[:, :-1] & real[:, 1:]
    rows, places = counts.nonzero(as_tuple=True)
    for r, t in zip(torch.split(rows, _CHUNK), torch.split(places, _CHUNK), strict=True):
        log_p = logits[r, t].float().log_softmax(-1)
        p = log_p.exp()
        if answer == "entropy":
            entropy = -(p * log_p).sum(-1, keepdim=True)
            slope = -p * (log_p + entropy)
        else:
            targets = ids[r, t + 1]
            if answer == "sampled":
                targets = drawn(p, generator).to(ids.device)
            slope = p
            slope[torch.arange(len(r), device=ids.device), targets] -= 1
        result[r, t] = slope.to(result.dtype)
    return result


def _needing_gradient(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    """A leaf of the graph, so that gradients flow however the weights are set."""
    return output.detach().requires_grad_()


def keeping(given: dict[str, Tensor], name: str) -> Forward:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given[name] = args[0]

    return hook
