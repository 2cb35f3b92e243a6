"""Routers that read the prompt and fix for the whole sequence which blocks decoding leaves out."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy, Block
from billhook.data import Windows
from billhook.plan.errors import InputError
from billhook.runtime.attached import Attached
from billhook.runtime.counts import Counts
from billhook.runtime.online import Online, Pass, Skip
from billhook.runtime.policy import Policy
from billhook.runtime.routers import Routers, routable, train_routers, without_entries

_MARK = "billhook_left_out"


class FirstRouter(Policy):
    """A small router in front of each block reads the prompt; blocks that it thinks worth less than ``threshold`` are
    left out for all that is decoded after it. The prompt itself runs whole. Each row of a batch has a route of its own.

    The router of block l: p_l = sigmoid(w_l . mean over the prompt's real tokens of x / rms(x) + b_l), with x [hidden]
    the stream into the block; the block is left out where p_l < ``threshold``. ``fitted`` trains w and b on text, all
    weights of the model frozen, so that the model keeps predicting what it did while it runs a share ``keep`` of the
    blocks that may be left out (see ``routers.train_routers``). A threshold of 0 leaves nothing out.

    Source: FiRST, Jain et al. 2025 (arXiv 2410.12513): routers per layer, decided in the prefill, fixed for the
    sequence, soft gates in training, and a penalty for blocks that run. There LoRA adapters are trained as well, and
    the loss is that of the task. Chosen here: routers alone, the plain model's predictions as the aim, a share to run
    in place of a weight for the penalty, and the threshold as the dial, so that one training serves every amount of
    work.

    Keys and values: of the prompt in every block; of decoded tokens none where the block is left out, and nobody asks
    for them, since the route holds for the sequence. So the cache grows more slowly too. Where rows of a batch disagree
    the block works for some and makes keys and values for all. Projected from the stream instead, for every token, in
    the first block of each further kind of cache (full attention; each sliding window), from which transformers takes
    masks, and in blocks whose keys and values others read. The first block always runs. State: the route, kept on the
    cache itself: it goes where the cache goes, and whatever is read later on the same cache, another prompt too, keeps
    to it. Without a cache every pass is a prompt and nothing is left out.
    """

    name: ClassVar[str] = "first-router"
    paper: ClassVar[str] = "Jain et al. 2025, arXiv 2410.12513"
    kv: ClassVar[str] = "no entry for decoded tokens; the prompt's everywhere"
    dial: ClassVar[tuple[str, float, float]] = ("threshold", 0.0, 1.0)
    wants_text: ClassVar[bool] = True
    appetite: ClassVar[int] = 8

    threshold: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    keep: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.75
    steps: Annotated[int, Field(ge=1, le=10_000)] = 60

    _routers: Routers | None = PrivateAttr(default=None)

    def fitted(self, model: PreTrainedModel, anatomy: Anatomy, windows: Windows) -> Self:
        """With routers trained on the windows, unless it has them."""
        if self._routers is not None:
            return self
        return self._with(train_routers(model, anatomy, windows, keep=self.keep, steps=self.steps))

    def turned(self, *values: float) -> Self:
        return super().turned(*values)._with(self._routers)

    def tensors(self) -> dict[str, Tensor]:
        """The routers: w [blocks, hidden] and b [blocks]."""
        return {} if self._routers is None else {"w": self._routers.weight, "b": self._routers.bias}

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        weight, bias = tensors.get("w"), tensors.get("b")
        if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise InputError("policy first-router: its tensors must be w [blocks, hidden] and b [blocks]")
        return self._with(Routers(weight, bias))

    def _with(self, routers: Routers | None) -> Self:
        return self.model_copy()._holding(routers)

    def _holding(self, routers: Routers | None) -> Self:
        self._routers = routers
        return self

    def _attach(self, model: PreTrainedModel, anatomy: Anatomy) -> Attached:
        counts = Counts()
        routers = self._routers
        if routers is None and self.threshold > 0:
            raise InputError(
                f"policy {self.name}: a threshold above 0 needs routers trained on text (tune-policy does)"
            )
        stack = anatomy.outline.stack("decoder")
        if routers is not None and routers.weight.shape != (len(stack.blocks), stack.hidden_size):
            raise InputError(
                f"policy first-router: its routers are for {routers.weight.shape[0]} blocks of width "
                f"{routers.weight.shape[1]}, the decoder has {len(stack.blocks)} of {stack.hidden_size}"
            )
        trigger = _Route(
            routers or Routers(torch.zeros(0, 0), torch.zeros(0)),
            self.threshold,
            routable(anatomy) if routers is not None else [],
            without_entries(anatomy),
        )
        return Attached(model, self, counts, Online(model, anatomy, trigger, ["decoder"], counts).fit, beams=False)


class _Route:
    """For each block that may be left out, who of the rows leaves it out: plain numbers, decided once a sequence."""

    def __init__(self, routers: Routers, threshold: float, blocks: list[int], gaps: frozenset[int]) -> None:
        self._routers, self._threshold, self._blocks, self._gaps = routers, threshold, set(blocks), gaps
        self._left: dict[int, list[bool]] = {}

    def begin(self, now: Pass) -> None:
        if now.past == 0:
            self._left = {}
            if now.cache is not None:
                vars(now.cache)[_MARK] = self._left
        else:
            self._left = vars(now.cache).get(_MARK, {}) if now.cache is not None else {}

    def decide(self, block: Block, stream: Tensor, now: Pass) -> Skip | None:
        index = block.address.block
        if now.past == 0:
            if index in self._blocks:
                self._left[index] = (self._routers.worth(index, stream, now.real) < self._threshold).tolist()
            return None
        left = self._left.get(index, [])
        if not any(left):
            return None
        if len(left) != now.rows:
            raise InputError(f"a route was decided for {len(left)} rows, and {now.rows} go on from its cache")
        kinds = frozenset(sub.kind for sub in block.sublayers)
        if all(left):
            return Skip(kinds, entries=index not in self._gaps)
        return Skip(kinds, torch.tensor(left, device=stream.device)[:, None].expand(now.rows, now.tokens))

    def saw(self, block: Block, before: Tensor, after: Tensor, now: Pass) -> None:
        pass

    def saw_mlp(self, block: Block, before: Tensor, after: Tensor, now: Pass) -> None:
        pass
