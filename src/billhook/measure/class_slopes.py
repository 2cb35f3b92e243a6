"""How the answer of a classifier would change if inner units were turned down: one backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from billhook.anatomy.types import Anatomy, Inner
from billhook.measure.batches import Batch, batches_of
from billhook.measure.patch import hooked, observing
from billhook.measure.sensitivity import Slopes, keeping, of_units
from billhook.plan.address import Address
from billhook.plan.errors import InputError


def class_slopes(
    model: nn.Module, anatomy: Anatomy, units: Mapping[Address, Inner], source: Iterable[Batch]
) -> dict[Address, Slopes]:
    """The slopes of inner units (see ``Slopes``, an image being a text) for L the sum over images of the entropy of the
    model's own distribution over classes. No labels are needed.

    ``source`` are batches with ``pixel_values``. Cost: about three forward passes. Memory: the activations of one
    batch. Raises InputError for a model that gives no logits [images, classes], and where a slope is not finite.
    """
    writes = {a: [s for s in inner.slices if s.writes] for a, inner in units.items()}
    names = sorted({s.parameter for slices in writes.values() for s in slices})
    found: dict[Address, Slopes] = {}
    for batch in batches_of(source, model):
        if "pixel_values" not in batch:
            raise InputError("slopes of a classifier need batches with pixel_values")
        inputs = {**batch, "pixel_values": batch["pixel_values"].detach().requires_grad_()}  # so that a graph is made
        given: dict[str, Tensor] = {}
        hooks = [(model.get_submodule(name.removesuffix(".weight")), keeping(given, name)) for name in names]
        with observing(model), hooked(hooks), torch.enable_grad():
            logits = getattr(model(**inputs), "logits", None)
            if logits is None or logits.ndim != 2:
                raise InputError(f"this {anatomy.family} model is no classifier: it gives no logits of classes")
            entropies = entropy(logits)
            gradients = torch.autograd.grad(entropies.sum(), list(given.values()))
        products = {n: x.detach().float() * g.float() for (n, x), g in zip(given.items(), gradients, strict=True)}
        for address, inner in units.items():
            own = [of_units(products[s.parameter], s.start, s.width, inner.count) for s in writes[address]]
            total = torch.stack(own).sum(0).reshape(len(logits), -1, inner.count)
            slopes = Slopes.of(total, torch.ones(total.shape[:2], dtype=torch.bool, device=total.device))
            if not torch.isfinite(slopes.squares).all():
                raise InputError(f"the slopes of {address} are not finite: weights or inputs are damaged")
            found[address] = found[address] + slopes if address in found else slopes
    return found


def entropy(logits: Tensor) -> Tensor:
    """Of each distribution over classes [images, classes], in nats: [images]."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)
