"""MLPs left out once the stream stops turning in them."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy, Block
from billhook.runtime.attached import Attached
from billhook.runtime.counts import Counts
from billhook.runtime.online import Online, Pass, Skip
from billhook.runtime.policy import Policy

_MLP = frozenset(("mlp",))


class FfnSkip(Policy):
    """While a token is generated: where an MLP turns the stream so little that cos(before, after) > ``threshold``, the
    MLPs of the next ``span`` blocks are left out for that token; then one runs again to look anew.

    The first ``first`` and the last ``last`` blocks (the cold regions) and the first ``warmup`` generated tokens always
    run whole, and so does whatever is read several tokens at a time, as prompts are. Saturation is per token: rows of a
    batch decide for themselves.

    Source: FFN-SkipLLM, Jaiswal et al. 2024 (arXiv 2404.03865): saturation by cosine similarity in the middle of the
    model, cold regions at its ends, and full first tokens, since later ones attend to them most. Chosen here: how many
    are left out before looking again.

    Keys and values: never skipped, every attention runs. State: within a token, how many MLPs are still to be left
    out; across tokens, only where generation began. Cost beside the model's own: one cosine for every MLP that runs.
    """

    name: ClassVar[str] = "ffn-skip"
    paper: ClassVar[str] = "Jaiswal et al. 2024, arXiv 2404.03865"
    kv: ClassVar[str] = "never skipped"
    dial: ClassVar[tuple[str, float, float]] = ("threshold", 1.0, -1.0)

    threshold: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.98
    span: Annotated[int, Field(ge=1)] = 2
    first: Annotated[int, Field(ge=0)] = 4
    last: Annotated[int, Field(ge=0)] = 2
    warmup: Annotated[int, Field(ge=0)] = 4

    def _attach(self, model: PreTrainedModel, anatomy: Anatomy) -> Attached:
        counts = Counts()
        middle = range(self.first, len(anatomy.stack("decoder").blocks) - self.last)
        online = Online(model, anatomy, _Saturation(self, middle), ["decoder"], counts, watched=middle)
        return Attached(model, self, counts, online.fit)


class _Saturation:
    """Decisions are plain numbers, one a row: a tensor would cost as much as a good part of a small MLP."""

    def __init__(self, policy: FfnSkip, middle: range) -> None:
        self._policy = policy
        self._middle = middle
        self._began = 0  # tokens in the cache when the first one was generated
        self._looking = False
        self._left: list[int] = []  # MLPs still to be left out, of each row
        self._skipped: list[bool] = []  # who leaves out the MLP of this block

    def begin(self, now: Pass) -> None:
        if now.prompt:
            self._began = now.past + now.tokens
        self._looking = not now.prompt and now.past - self._began >= self._policy.warmup and self._policy.threshold < 1
        self._left = [0] * now.rows

    def decide(self, block: Block, stream: Tensor, now: Pass) -> Skip | None:
        if not self._looking or block.address.block not in self._middle:
            return None
        self._skipped = [left > 0 for left in self._left]
        self._left = [max(left - 1, 0) for left in self._left]
        if all(self._skipped):
            return Skip(_MLP)
        return Skip(_MLP, torch.tensor(self._skipped, device=stream.device)[:, None]) if any(self._skipped) else None

    def saw(self, block: Block, before: Tensor, after: Tensor, now: Pass) -> None:
        pass

    def saw_mlp(self, block: Block, before: Tensor, after: Tensor, now: Pass) -> None:
        if not self._looking or block.address.block + 1 not in self._middle:
            return  # nothing follows that a look could spare
        # one small product and one transfer: a look has to cost far less than the MLP that it may spare
        pair = torch.cat((before, after), dim=1).float()
        for row, ((b, shared), (_, a)) in enumerate(torch.bmm(pair, pair.mT).tolist()):
            turned = shared <= self._policy.threshold * math.sqrt(a * b)
            if not turned and not self._skipped[row]:
                self._left[row] = self._policy.span
