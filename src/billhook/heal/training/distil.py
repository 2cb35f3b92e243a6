"""What a cut model is to learn: the next token, the dense model's distribution over it, and its stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from billhook.heal.training.head import Head

CHUNK = 128  # positions whose logits are held at once
_SMALLEST = 1e-20

Piecewise = Callable[[Tensor, slice], Tensor]


def loss_on_text(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of the targets [n] in nats; ``hidden`` [n, h] is what the head reads."""

    def piecewise(piece: Tensor, here: slice) -> Tensor:
        return torch.nn.functional.cross_entropy(head(piece).float(), targets[here], reduction="sum")

    return _summed(hidden, piecewise) / len(hidden)


def divergence(hidden: Tensor, head: Head, dense: Tensor, dense_head: Head) -> Tensor:
    """Mean KL(dense || cut) of the next-token distributions, in nats a token.

    What is kept of the dense model is the last stream [n, h], not its logits: it is a hundredth of their size, and the
    whole vocabulary takes part, not only the likeliest tokens. Both heads run over ``CHUNK`` positions at once, and the
    gradient of each chunk is taken on the spot, so memory is a few times CHUNK x vocabulary x 4 bytes.
    """

    def piecewise(piece: Tensor, here: slice) -> Tensor:
        with torch.no_grad():
            log_p = dense_head(dense[here]).float().log_softmax(-1)
        log_q = head(piece).float().log_softmax(-1)
        return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")

    return _summed(hidden, piecewise) / len(hidden)


def stream_error(now: Tensor, dense: Tensor) -> Tensor:
    """Mean over tokens of |now - dense|^2 / |dense|^2, for streams [..., h]: each token counts relative to its own
    size, or a few huge ones would decide."""
    dense = dense.float()
    lacking = (now.float() - dense).square().sum(-1)
    return (lacking / dense.square().sum(-1).clamp(min=_SMALLEST)).mean()


def _summed(hidden: Tensor, piecewise: Piecewise) -> Tensor:
    if torch.is_grad_enabled() and hidden.requires_grad:
        result: Tensor = _Chunked.apply(hidden, piecewise)  # type: ignore[no-untyped-call]
        return result
    starts = range(0, len(hidden), CHUNK)
    return torch.stack([piecewise(hidden[i : i + CHUNK], slice(i, i + CHUNK)) for i in starts]).sum()


class _Chunked(torch.autograd.Function):
    """A sum over pieces whose graphs are gone as soon as their gradient with respect to the input is known."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, piecewise: Piecewise) -> Tensor:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), CHUNK):
            here = slice(start, start + CHUNK)
            with torch.enable_grad():
                piece = hidden[here].detach().requires_grad_()
                loss = piecewise(piece, here)
            (gradient[here],) = torch.autograd.grad(loss, piece)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return upstream[0].to(gradient.dtype) * gradient, None
