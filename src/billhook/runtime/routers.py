"""What a block is worth to a prompt: small linear routers, and their training beside a frozen model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy
from billhook.anatomy.undo import Undo, frozen
from billhook.data import Windows
from billhook.plan.errors import InputError
from billhook.runtime.silence import Forward, place, stream_in, stream_out, with_stream

ROWS = 4
RATE = 0.02
TEMPERATURE = 1.0
STRENGTH = 20.0
"""Weight of the penalty: nats a token for all blocks too many."""


@dataclass(frozen=True)
class Routers:
    """One for each block of the decoder: weight [blocks, hidden], bias [blocks], float32."""

    weight: Tensor
    bias: Tensor

    def logit(self, block: int, stream: Tensor, real: Tensor | None) -> Tensor:
        """[rows], from the stream of a prompt [rows, tokens, hidden] and which of its tokens are real [rows, tokens]:
        w . mean of x / rms(x) + b. Each token counts alike, however large its stream."""
        x = stream.float()
        x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        if real is None:
            mean = x.mean(1)
        else:
            share = real.to(x) / real.sum(-1, keepdim=True).clamp(min=1)
            mean = (x * share[..., None]).sum(1)
        return mean @ self.weight[block].to(mean.device) + self.bias[block].to(mean.device)

    def worth(self, block: int, stream: Tensor, real: Tensor | None) -> Tensor:
        """The probability that the block should run, [rows]."""
        return self.logit(block, stream, real).sigmoid()


def routable(anatomy: Anatomy) -> list[int]:
    """The blocks of the decoder that may be left out: all but the first, which makes the stream of the words."""
    return list(range(1, len(anatomy.stack("decoder").blocks)))


def without_entries(anatomy: Anatomy) -> frozenset[int]:
    """Those of them whose cache may lack the decoded tokens: not the first of its kind of cache, from which positions
    and masks are taken, and none that is pinned, since others read its keys and values."""
    outline = anatomy.outline
    seen: set[object] = set()
    found = set()
    for block, sizes in zip(anatomy.stack("decoder").blocks, outline.stack("decoder").blocks, strict=True):
        attention = sizes.sublayers.get("attention")
        kind = "none" if attention is None else attention.window
        units = (block.address, *(sub.address for sub in block.sublayers))
        if kind in seen and not any(str(unit) in outline.pinned for unit in units):
            found.add(block.address.block)
        seen.add(kind)
    return frozenset(found)


def train_routers(
    model: PreTrainedModel, anatomy: Anatomy, windows: Windows, *, keep: float, steps: int, seed: int = 0
) -> Routers:
    """Routers under which the model goes on predicting what it does, while it runs a share ``keep`` of ``routable``.

    A step takes ``ROWS`` windows [T] and a place P drawn from T/4 to 3T/4: the first P tokens are the prompt, which
    runs whole and which the routers read; after it each block hands on x + g (y - x), with g in {0, 1} drawn for each
    row as the router says (logistic noise, temperature ``TEMPERATURE``), its gradient that of the soft gate
    (straight-through). So a training pass computes what decoding will. The loss, in nats a token:

        KL(plain || routed) after the tokens behind P + ``STRENGTH`` (mean p - ``keep``)^2

    with p the routers' probabilities. Adam on w and b, rate ``RATE`` for b and a tenth of it for w, decaying to 0 along
    a cosine. Weights of the model are frozen and come back as they were. Cost: each step two forward passes and one
    backward pass of ``ROWS`` windows. The same seed gives the same routers. InputError for fewer than two blocks that
    may be left out, for windows below 8 tokens, and where the loss is not finite.
    """
    blocks = routable(anatomy)
    if model.config.is_encoder_decoder:
        raise InputError("routers are trained on a prompt and its continuation, which an encoder-decoder does not read")
    if len(blocks) < 2 or windows.ids.shape[1] < 8:
        raise InputError(
            f"routers need 2 or more blocks that may be left out, not {len(blocks)}, and windows of 8 or more tokens, "
            f"not {windows.ids.shape[1]}"
        )
    stack, device = anatomy.outline.stack("decoder"), next(model.parameters()).device
    weight = torch.zeros(len(stack.blocks), stack.hidden_size, device=device, requires_grad=True)
    bias = torch.full((len(stack.blocks),), math.log(keep / (1 - keep)), device=device, requires_grad=True)
    adam = torch.optim.Adam([{"params": [weight], "lr": RATE / 10}, {"params": [bias], "lr": RATE}])
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    routers, draw = Routers(weight, bias), torch.Generator().manual_seed(seed)
    length = windows.ids.shape[1]
    order = _order(len(windows.ids), draw)
    with frozen(model):
        for _ in range(steps):
            ids = windows.ids[[next(order) for _ in range(ROWS)]].to(device)
            prompt = int(torch.randint(length // 4, 3 * length // 4 + 1, (), generator=draw))
            with torch.no_grad():
                plain = _after(model, ids, prompt)
            said: list[Tensor] = []
            undo = Undo()
            for index in blocks:
                module = model.get_submodule(anatomy.stack("decoder").blocks[index].path)
                place(module, _routed(module.forward, routers, index, prompt, said, draw), undo)
            try:
                with torch.enable_grad():
                    routed = _after(model, ids, prompt)
                    kl = (plain.exp() * (plain - routed)).sum(-1).mean()
                    loss = kl + STRENGTH * (torch.stack(said).mean() - keep) ** 2
            finally:
                undo.restore()
            if not bool(loss.isfinite()):
                raise InputError("the loss of the routers is not finite: the weights or the text are damaged")
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            decay.step()
    return Routers(weight.detach(), bias.detach())


def _after(model: PreTrainedModel, ids: Tensor, prompt: int) -> Tensor:
    """Log-probabilities after each token behind the prompt, float32."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, prompt:-1]
    return logits.float().log_softmax(-1)


def _routed(
    original: Forward, routers: Routers, index: int, prompt: int, said: list[Tensor], draw: torch.Generator
) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Any:
        stream = stream_in(*args, **kwargs)
        logit = routers.logit(index, stream[:, :prompt], None)
        said.append(logit.sigmoid())
        noise = torch.rand(len(logit), generator=draw).clamp(1e-6, 1 - 1e-6).logit().to(logit.device)
        soft = ((logit + noise) / TEMPERATURE).sigmoid()
        gate = (soft > 0.5).to(soft) + soft - soft.detach()
        output = original(*args, **kwargs)
        after = stream_out(output)
        change = (after - stream)[:, prompt:] * gate.to(after.dtype)[:, None, None]
        return with_stream(output, torch.cat([after[:, :prompt], stream[:, prompt:] + change], dim=1))

    return forward


def _order(count: int, draw: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(count, generator=draw).tolist()
