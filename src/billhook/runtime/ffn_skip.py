"""MLPs left out once the stream stops turning in them."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
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
        trigger = _Saturation(self, len(anatomy.stack("decoder").blocks))
        online = Online(model, anatomy, trigger, ["decoder"], counts, watch_mlps=True)
        return Attached(model, self, counts, online.fit)


class _Saturation:
    def __init__(self, policy: FfnSkip, blocks: int) -> None:
        self._policy = policy
        self._middle = range(policy.first, blocks - policy.last)
        self._began = 0  # tokens in the cache when the first one was generated
        self._left: Tensor | None = None  # MLPs still to be left out, [batch, tokens]
        self._skipped: Tensor | None = None  # who left out the MLP of this block

    def begin(self, now: Pass) -> None:
        if now.prompt:
            self._began = now.past + now.tokens
        looking = not now.prompt and now.past - self._began >= self._policy.warmup
        self._left = torch.zeros(now.rows, now.tokens, dtype=torch.int64) if looking else None

    def decide(self, block: Block, stream: Tensor, now: Pass) -> Skip | None:
        self._skipped = None
        if self._left is None or block.address.block not in self._middle:
            return None
        self._left = self._left.to(stream.device)
        self._skipped = self._left > 0
        self._left = (self._left - 1).clamp(min=0)
        return Skip(_MLP, self._skipped)

    def saw(self, block: Block, before: Tensor, after: Tensor, now: Pass) -> None:
        pass

    def saw_mlp(self, block: Block, before: Tensor, after: Tensor, now: Pass) -> None:
        if self._left is None or self._skipped is None:
            return
        still = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1) > self._policy.threshold
        still &= ~self._skipped if self._policy.threshold < 1 else False  # rounding may take a cosine beyond 1
        self._left = torch.where(still, self._policy.span, self._left)
