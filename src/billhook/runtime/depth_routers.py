"""Which tokens a block is worth to: a small linear router for each block, and its training beside a frozen model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy
from billhook.anatomy.modality import vision_tokens
from billhook.anatomy.undo import Undo, frozen
from billhook.plan.errors import InputError
from billhook.runtime.silence import Forward, place, stream_in, stream_out, with_stream

Batch = Mapping[str, Any]
"""Arguments of a model's forward."""

RATE = 0.02
SCALE = 0.2
"""How far the weight of a token may lie from 1."""
SPREAD = 0.1
"""Standard deviation of the scores of routers that are drawn."""
LEVELS = 101


@dataclass(frozen=True)
class DepthRouters:
    """``weight`` [blocks, hidden], a router for each block of the decoder; ``levels`` [blocks, ``LEVELS``], the
    quantiles of the scores that it gave to tokens, from the least to the highest. Zeros where a block has none."""

    weight: Tensor
    levels: Tensor

    def score(self, block: int, stream: Tensor) -> Tensor:
        """w . x / rms(x) for each token, [rows, tokens], float32."""
        x = stream.float()
        return (x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()) @ self.weight[block].to(x.device)

    def level(self, block: int, ratio: float) -> float:
        """The score that a share ``ratio`` of tokens reaches; those between two quantiles by interpolation."""
        place = (1 - ratio) * (self.levels.shape[1] - 1)
        low, high = math.floor(place), math.ceil(place)
        return float(torch.lerp(self.levels[block, low], self.levels[block, high], place - low))

    def handed_on(self, stream: Tensor, after: Tensor, score: Tensor, runs: Tensor) -> Tensor:
        """x + m (y - x) for tokens that run (1), m x for those that do not (0), m = 1 + ``SCALE`` tanh(score), with x
        the stream that came in and y what the block made of it; ``runs`` [rows, tokens]."""
        weight = (1 + SCALE * score.tanh()).to(stream.dtype)[..., None]
        runs = runs.to(stream.dtype)[..., None]
        return runs * (stream + weight * (after - stream)) + (1 - runs) * weight * stream


def kept_shares(count: int, ratio: float, *, decay: bool) -> list[float]:
    """What share of the tokens runs in each of ``count`` blocks, ``ratio`` in the mean.

    With ``decay`` less and less of them, along ratio + a cos(pi i / (count - 1)), a = min(1/2, ratio, 1 - ratio), so
    that none lies outside 0 to 1. Source: p-MoD (arXiv 2412.04449) and its code (MCG-NJU/p-MoD), whose shifted cosine
    over all blocks this is at ratio 1/2; there a is always 1/2, and shares too small or too large are clipped.
    """
    if not decay or count == 1:
        return [ratio] * count
    swing = min(0.5, ratio, 1 - ratio)
    return [min(max(ratio + swing * math.cos(math.pi * i / (count - 1)), 0.0), 1.0) for i in range(count)]


def train_depth_routers(
    model: PreTrainedModel,
    anatomy: Anatomy,
    batches: Sequence[Batch],
    blocks: Sequence[int],
    *,
    ratio: float,
    decay: bool,
    vision: bool,
    steps: int,
    seed: int = 0,
) -> DepthRouters:
    """Routers for ``blocks`` under which the model goes on predicting what it does though tokens step around them.

    A step takes one batch. In each of the blocks the tokens whose scores are highest run, a share r of those that are
    routed in the batch (``kept_shares`` of ``ratio``, in every other step of a ratio drawn above it). The gradient
    of what runs is that of a soft gate, sigmoid((score - level) / T), with T the spread of the scores
    (straight-through). The loss, in nats a token: KL(plain || routed) of the next tokens, after every real token that
    does not stand for a part of an image. With ``vision`` the tokens of images alone are routed, all the others run.
    Adam on the routers, rate ``RATE`` times ``SPREAD``, decaying to 0 along a cosine. Weights of the model are frozen.
    ``levels`` are measured in the end, at ``ratio``, over all batches.

    Cost: each step two forward passes and one backward pass of a batch, all tokens computed. The same seed gives the
    same routers. InputError where nothing is routed, and where the loss is not finite.
    """
    stack, device = anatomy.outline.stack("decoder"), next(model.parameters()).device
    draw = torch.Generator().manual_seed(seed)
    weight = torch.zeros(len(stack.blocks), stack.hidden_size)
    weight[list(blocks)] = torch.randn(len(blocks), stack.hidden_size, generator=draw) * SPREAD / stack.hidden_size**0.5
    weight = weight.to(device).requires_grad_(True)
    routers = DepthRouters(weight, torch.zeros(len(stack.blocks), LEVELS))
    adam = torch.optim.Adam([weight], lr=RATE * SPREAD)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    seen = vision_tokens(model)
    with frozen(model):
        for step in range(steps):
            batch = batches[step % len(batches)]
            share = ratio if step % 2 else ratio + (1 - ratio) * float(torch.rand((), generator=draw))
            routed, told = _tokens(batch, seen, vision)
            with torch.no_grad():
                plain = _predicted(model, batch, told)
            shares = dict(zip(blocks, kept_shares(len(blocks), share, decay=decay), strict=True))
            with torch.enable_grad(), _Soft(model, anatomy, routers, shares, routed):
                other = _predicted(model, batch, told)
                loss = (plain.exp() * (plain - other)).sum(-1).mean()
            if not bool(loss.isfinite()):
                raise InputError("the loss of the routers is not finite: the weights or the input are damaged")
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            falling.step()
        routers = DepthRouters(weight.detach(), routers.levels)
        shares = dict(zip(blocks, kept_shares(len(blocks), ratio, decay=decay), strict=True))
        return _levelled(model, anatomy, routers, shares, batches, seen, vision)


def _levelled(
    model: PreTrainedModel,
    anatomy: Anatomy,
    routers: DepthRouters,
    shares: dict[int, float],
    batches: Sequence[Batch],
    seen: tuple[int, ...],
    vision: bool,
) -> DepthRouters:
    """With the quantiles of the scores of all batches, each routed at ``shares``."""
    scores: dict[int, list[Tensor]] = {block: [] for block in shares}
    for batch in batches:
        routed, _ = _tokens(batch, seen, vision)
        with torch.no_grad(), _Soft(model, anatomy, routers, shares, routed) as soft:
            model(**batch, use_cache=False)
        for block, found in soft.scores.items():
            scores[block].append(found)
    levels = torch.zeros(len(routers.weight), LEVELS)
    places = torch.linspace(0, 1, LEVELS)
    for block, parts in scores.items():
        ordered = torch.cat(parts).cpu().sort().values
        place = places * (len(ordered) - 1)
        levels[block] = torch.lerp(ordered[place.floor().long()], ordered[place.ceil().long()], place.frac())
    return DepthRouters(routers.weight, levels.to(routers.weight.device))


class _Soft:
    """Blocks whose tokens are weighed against each other within a batch, differentiably; for the length of a with."""

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        routers: DepthRouters,
        shares: dict[int, float],
        routed: Tensor,
    ) -> None:
        self.scores: dict[int, Tensor] = {}
        self._model, self._anatomy, self._routers, self._shares = model, anatomy, routers, shares
        self._routed, self._undo = routed, Undo()

    def __enter__(self) -> _Soft:
        for block, share in self._shares.items():
            module = self._model.get_submodule(self._anatomy.stack("decoder").blocks[block].path)
            place(module, self._weighed(module.forward, block, share), self._undo)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.restore()

    def _weighed(self, original: Forward, block: int, share: float) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            stream, output = stream_in(*args, **kwargs), original(*args, **kwargs)
            score, routed = self._routers.score(block, stream), self._routed
            some = score[routed]
            self.scores[block] = some.detach()
            keep = round(share * len(some))
            level = some.detach().topk(keep).values[-1] if keep else some.detach().max() + 1
            soft = ((score - level) / some.detach().std().clamp(min=1e-6)).sigmoid()
            runs = (score >= level).to(soft) + soft - soft.detach()
            after = stream_out(output)
            left = torch.where(routed[..., None], self._routers.handed_on(stream, after, score, runs), after)
            return with_stream(output, left)

        return forward


def _tokens(batch: Batch, seen: tuple[int, ...], vision: bool) -> tuple[Tensor, Tensor]:
    """Which tokens of a batch are routed, and after which the next one is predicted: bool [rows, tokens]."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    images = torch.isin(ids, torch.tensor(seen, device=ids.device, dtype=ids.dtype))
    routed = images & real if vision else real
    if not routed.any():
        raise InputError("routers of the tokens of images learn from input with images, and this has none")
    return routed, real & ~images


def _predicted(model: PreTrainedModel, batch: Batch, told: Tensor) -> Tensor:
    """Log-probabilities of the next token [n, vocabulary], float32."""
    logits: Tensor = model(**batch, use_cache=False).logits[told]
    return logits.float().log_softmax(-1)
