"""Which tokens of what a model reads stand for images, known while it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.anatomy.modality import vision_tokens
from billhook.anatomy.undo import Undo
from billhook.plan.errors import InputError


class Images:
    """The tokens of images in the pass at hand, told by the ``input_ids`` that the model is given; videos are images
    too. False for a model that reads text alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._tokens = model, torch.tensor(vision_tokens(model), device=model.device)
        self._here: Tensor | None = None

    def __bool__(self) -> bool:
        return len(self._tokens) > 0

    def fit(self, undo: Undo) -> None:
        """Watch what the model reads until ``undo`` is restored."""
        undo.then(self._model.register_forward_pre_hook(self._look, with_kwargs=True).remove)

    def _look(self, module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self._here = torch.isin(ids, self._tokens.to(ids.device)) if isinstance(ids, Tensor) else None

    def among(self, tokens: Tensor) -> Tensor:
        """Of ``tokens`` [..., width], those of this pass, which stand for images, bool [...]. InputError where the
        model was given no ids to tell them by."""
        if self._here is None or self._here.numel() != tokens[..., 0].numel():
            raise InputError("a policy that sets images apart tells images by input_ids, and there are none")
        return self._here.reshape(tokens.shape[:-1])
