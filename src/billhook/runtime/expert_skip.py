"""Experts left out for a token where they matter little."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy
from billhook.anatomy.mixtures import Mixture, mixture_of
from billhook.anatomy.undo import Undo
from billhook.data import Windows
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.runtime.attached import Attached
from billhook.runtime.counts import Counts
from billhook.runtime.images import Images
from billhook.runtime.policy import Dial, Policy
from billhook.runtime.silence import Forward, place

Threshold = Annotated[float, Field(ge=0.0, le=1.0)]
TOKENS_AT_ONCE = 1024


class ExpertSkip(Policy):
    """An expert that the router picked for a token is left out where its share of the token's routing weights, times
    the ``importance`` of its layer, is below the threshold of the token's kind: ``text`` or ``vision``.

    ``importance`` has a number from 0 to 1 for each mixture, in order; none means that all matter alike. ``fitted``
    measures it: the divergence of the output from the plain model's if a mixture's picked experts are all left out
    (those shared by all tokens stay), relative to the largest. Where ``vision`` is not given, one threshold serves all
    tokens; given, ``tune-policy`` looks for both thresholds (see ``frontier``). What is left out is not computed, and
    the other experts keep their weights: they do not take over.

    Source: MoDES (arXiv 2511.15690): routing probability by the layer's global importance, thresholds by modality.
    There the probability is the router's softmax over all experts; here a token's weights are taken relative to their
    sum, since some families normalise them, some do not, and some scale them.

    Keys and values: never skipped, every attention runs. State: none. Cost beside the model's own: a comparison for
    each picked expert; where some of a pass are left out, a copy of the stream for each of those that are not.
    """

    name: ClassVar[str] = "expert-skip"
    paper: ClassVar[str] = "MoDES, arXiv 2511.15690"
    kv: ClassVar[str] = "never skipped"
    dial: ClassVar[Dial | None] = ("text", 0.0, 1.0)
    wants_text: ClassVar[bool] = True

    text: Threshold = 0.0
    vision: Threshold | None = None
    importance: tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...] = ()

    @property
    def dials(self) -> tuple[Dial, ...]:
        return (("text", 0.0, 1.0),) if self.vision is None else (("text", 0.0, 1.0), ("vision", 0.0, 1.0))

    def fitted(self, model: PreTrainedModel, anatomy: Anatomy, windows: Windows) -> Self:
        """With the importance of each mixture measured on text, unless it is there: one pass for each of them, and one
        of the plain model."""
        if self.importance:
            return self
        mixtures = _some(anatomy)
        rises = [0.0] * len(mixtures)
        rows = max(1, TOKENS_AT_ONCE // windows.ids.shape[1])
        for ids in torch.split(windows.ids.to(model.device), rows):
            plain = _predicted(model, ids)
            for number, mixture in enumerate(mixtures.values()):
                undo = Undo()
                place(model.get_submodule(mixture.experts), _nothing, undo)
                try:
                    other = _predicted(model, ids)
                finally:
                    undo.restore()
                rises[number] += float((plain.exp() * (plain - other)).sum(dtype=torch.float64))
        most = max(rises)
        return self.model_copy(
            update={"importance": tuple(max(rise, 0.0) / most if most > 0 else 1.0 for rise in rises)}
        )

    def _attach(self, model: PreTrainedModel, anatomy: Anatomy) -> Attached:
        mixtures = _some(anatomy)
        if len(self.importance) not in (0, len(mixtures)):
            raise InputError(
                f"policy expert-skip: importance has {len(self.importance)} numbers, the model has "
                f"{len(mixtures)} mixtures"
            )
        images = Images(model)
        if self.vision is not None and not images:
            raise InputError(f"policy expert-skip: this {anatomy.family} model reads text alone; leave out vision")
        counts = Counts()
        return Attached(model, self, counts, _Skipping(self, model, mixtures, images, counts).fit)


class _Skipping:
    """The policy at work: the mixtures with less to compute."""

    def __init__(
        self,
        policy: ExpertSkip,
        model: PreTrainedModel,
        mixtures: dict[Address, Mixture],
        images: Images,
        counts: Counts,
    ) -> None:
        self._policy, self._model, self._mixtures = policy, model, mixtures
        self._images, self._counts = images, counts

    def fit(self, undo: Undo) -> None:
        if self._policy.vision is not None:
            self._images.fit(undo)
        weights = self._policy.importance or (1.0,) * len(self._mixtures)
        for (address, mixture), importance in zip(self._mixtures.items(), weights, strict=True):
            module = self._model.get_submodule(mixture.experts)
            place(module, self._less(module.forward, address, importance), undo)

    def _less(self, original: Forward, address: Address, importance: float) -> Forward:
        def forward(hidden: Tensor, picked: Tensor, weights: Tensor) -> Tensor:
            runs = self._runs(weights, importance)
            ran = picked.numel() if runs is None else int(runs.sum())
            self._counts.picked[address] += picked.numel()
            self._counts.left_out[address] += picked.numel() - ran
            if runs is None or ran == picked.numel():
                output: Tensor = original(hidden, picked, weights)
                return output
            if ran == 0:
                return torch.zeros_like(hidden)
            tokens = runs.nonzero()[:, 0]  # each pick that runs is a token of its own, with one expert
            parts = original(hidden[tokens], picked[runs][:, None], weights[runs][:, None])
            return torch.zeros_like(hidden).index_add_(0, tokens, parts)

        return forward

    def _runs(self, weights: Tensor, importance: float) -> Tensor | None:
        """Which picks [n, k] are computed; None for all."""
        text, vision = self._policy.text, self._policy.vision
        if max(text, vision or 0.0) == 0:
            return None
        worth = importance * weights.float() / weights.float().sum(-1, keepdim=True).clamp(min=1e-30)
        if vision is None:
            return worth >= text
        return worth >= torch.where(self._images.among(weights), vision, text)[:, None]


def _mixtures(anatomy: Anatomy) -> dict[Address, Mixture]:
    """Those of the decoder, in order."""
    found = {a: mixture_of(u) for a, units in anatomy.inner.items() for u in units if u.kind == "expert"}
    return {a: found[a] for a in sorted(found) if a.stack == "decoder"}


def _some(anatomy: Anatomy) -> dict[Address, Mixture]:
    """The mixtures; InputError where there is none."""
    found = _mixtures(anatomy)
    if not found:
        raise InputError(
            f"policy expert-skip: this {anatomy.family} model has no mixture of experts that is understood"
        )
    return found


def _nothing(hidden: Tensor, picked: Tensor, weights: Tensor) -> Tensor:
    return torch.zeros_like(hidden)


def _predicted(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Log-probabilities of the next tokens."""
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=ids, use_cache=False).logits.float(), -1)
