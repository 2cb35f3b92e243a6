"""Blocks through which only the tokens pass that a small router picks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy, Block
from billhook.anatomy.undo import Undo
from billhook.data import Windows
from billhook.plan.errors import InputError
from billhook.runtime.attached import Attached
from billhook.runtime.attention_rank import attention_ranks
from billhook.runtime.counts import Counts
from billhook.runtime.depth_routers import Batch, DepthRouters, kept_shares, train_depth_routers
from billhook.runtime.images import Images
from billhook.runtime.numbers import read_numbers, write_numbers
from billhook.runtime.policy import Policy
from billhook.runtime.routers import routable
from billhook.runtime.silence import Forward, place, stream_in, stream_out, with_stream
from billhook.runtime.sparing import Sparing

ROWS = 4


class MixtureOfDepths(Policy):
    """In some ``blocks`` only a share of the tokens runs, ``ratio`` in the mean; the others step around the block. A
    router in each picks them. A ratio of 1 leaves nothing out.

    The router of block l scores a token by s = w_l . x / rms(x), with x [hidden] the stream into the block. Tokens
    whose score reaches the level that a share r_l of the tokens reached in training hand on x + m (y - x), with y what
    the block makes of x, the others m x, both with m = 1 + 0.2 tanh(s). With ``decay`` the shares r_l fall with depth
    along a cosine, else each is ``ratio``. Of a model that reads images, ``tokens=vision`` routes the tokens of images
    alone: words, in the prompt and generated, all run.

    ``fitted`` names the blocks, unless told: of all but the first a share ``convert``, those whose attention maps have
    the lowest rank. Then it trains the routers, all weights of the model frozen, so that the model keeps predicting
    what it did (see ``depth_routers``). One training serves every ratio: ``turned`` only moves the levels.

    Source: γ-MoD (arXiv 2410.13859): conversion of a trained model by the rank of attention maps (ARank), one router
    for words and images, masked routing; p-MoD (arXiv 2412.04449): weights gated by tanh (TanhNorm) on tokens that run
    and on those that do not (STRing), less tokens with depth (PRD); VideoLLM-MoD (arXiv 2408.16730): vision tokens
    alone. There the whole model is trained and a block takes the tokens of highest score in a sequence. Chosen here:
    routers alone; a level in place of the highest, so that a token's route depends on nothing after or beside it, and
    prompt, generated tokens, rows and padding are all alike; a cosine whose mean is ``ratio`` at every ratio.

    Keys and values: projected. A token that steps around a block leaves there the keys and values of the stream as it
    comes in, and every other token may attend to it; in the papers it leaves none, which saves cache too. State: none.
    What is left out is not computed, in a prompt either: MLP, queries, output. Cost beside the model's own: a product
    [hidden] for each token and converted block; where some run, moving them together; mixing is computed for all.
    """

    name: ClassVar[str] = "mixture-of-depths"
    paper: ClassVar[str] = "γ-MoD, arXiv 2410.13859; p-MoD, arXiv 2412.04449"
    kv: ClassVar[str] = "projected from the stream"
    dial: ClassVar[tuple[str, float, float]] = ("ratio", 1.0, 0.0)
    wants_text: ClassVar[bool] = True
    appetite: ClassVar[int] = 8

    ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    blocks: str = ""
    convert: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    decay: bool = True
    tokens: Literal["all", "vision"] = "all"
    steps: Annotated[int, Field(ge=1, le=10_000)] = 100

    _routers: DepthRouters | None = PrivateAttr(default=None)

    def fitted(self, model: PreTrainedModel, anatomy: Anatomy, windows: Windows) -> Self:
        """With blocks chosen and routers trained on the windows, unless it has them."""
        return self.fitted_on(
            model, anatomy, [{"input_ids": ids} for ids in torch.split(windows.ids.to(model.device), ROWS)]
        )

    def fitted_on(self, model: PreTrainedModel, anatomy: Anatomy, batches: Sequence[Batch]) -> Self:
        """As ``fitted``, on any input: arguments of the model's forward, ``input_ids`` among them."""
        if self._routers is not None:
            return self
        if model.config.is_encoder_decoder:
            raise InputError(f"policy {self.name} is trained on a text alone, which an encoder-decoder does not read")
        candidates, blocks = routable(anatomy), read_numbers(self.blocks)
        if not candidates:
            raise InputError(f"policy {self.name}: a decoder of one block has none to convert")
        if not blocks:
            ranks = attention_ranks(model, batches)
            count = max(1, round(self.convert * len(candidates)))
            blocks = sorted(sorted(candidates, key=lambda block: (ranks[block], block))[:count])
        chosen = self.model_copy(update={"blocks": write_numbers(blocks)})
        return chosen._with(
            train_depth_routers(
                model, anatomy, batches, chosen.converted(anatomy), ratio=self.ratio, decay=self.decay,
                vision=self.tokens == "vision", steps=self.steps,
            )
        )  # fmt: skip

    def converted(self, anatomy: Anatomy) -> list[int]:
        """The numbers of the blocks. InputError for one that is not there, and for the first, which makes the stream
        of the words."""
        numbers, last = sorted(set(read_numbers(self.blocks))), len(anatomy.stack("decoder").blocks) - 1
        if numbers and not 1 <= numbers[0] <= numbers[-1] <= last:
            raise InputError(f"policy {self.name}: blocks must be among 1 to {last}, not {self.blocks}")
        return numbers

    def turned(self, *values: float) -> Self:
        return super().turned(*values)._with(self._routers)

    def tensors(self) -> dict[str, Tensor]:
        """The routers: w [blocks, hidden] and levels [blocks, quantiles]."""
        return {} if self._routers is None else {"w": self._routers.weight, "levels": self._routers.levels}

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        weight, levels = tensors.get("w"), tensors.get("levels")
        if weight is None or levels is None or weight.ndim != 2 or levels.ndim != 2 or len(weight) != len(levels):
            raise InputError(
                f"policy {self.name}: its tensors must be w [blocks, hidden] and levels [blocks, quantiles]"
            )
        return self._with(DepthRouters(weight, levels))

    def _with(self, routers: DepthRouters | None) -> Self:
        return self.model_copy()._holding(routers)

    def _holding(self, routers: DepthRouters | None) -> Self:
        self._routers = routers
        return self

    def _attach(self, model: PreTrainedModel, anatomy: Anatomy) -> Attached:
        counts, stack, routers = Counts(), anatomy.outline.stack("decoder"), self._routers
        blocks, images = self.converted(anatomy), Images(model)
        if self.tokens == "vision" and not images:
            raise InputError(f"policy {self.name}: this {anatomy.family} model reads text alone; take tokens=all")
        if self.ratio == 1:
            return Attached(model, self, counts, lambda undo: None)
        if routers is None or not blocks:
            raise InputError(f"policy {self.name}: a ratio below 1 needs routers trained on text (tune-policy does)")
        if routers.weight.shape != (len(stack.blocks), stack.hidden_size):
            raise InputError(
                f"policy {self.name}: its routers are for {routers.weight.shape[0]} blocks of width "
                f"{routers.weight.shape[1]}, the decoder has {len(stack.blocks)} of {stack.hidden_size}"
            )
        shares = dict(zip(blocks, kept_shares(len(blocks), self.ratio, decay=self.decay), strict=True))
        depths = Depths(model, anatomy, routers, shares, images if self.tokens == "vision" else None, counts)
        return Attached(model, self, counts, depths.fit)


class Depths:
    """The policy at work: which tokens are routed in a pass, and the blocks that run for some of them."""

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        routers: DepthRouters,
        shares: dict[int, float],
        images: Images | None,
        counts: Counts,
    ) -> None:
        """``shares`` of the tokens that run in each block; ``images``: the tokens that are routed, None for all."""
        self._model, self._anatomy, self._routers = model, anatomy, routers
        self._shares, self._counts, self._images = shares, counts, images

    def fit(self, undo: Undo) -> None:
        if self._images is not None:
            self._images.fit(undo)
        for number, share in self._shares.items():
            block = self._anatomy.stack("decoder").blocks[number]
            module = self._model.get_submodule(block.path)
            place(module, self._block(module.forward, block, share), undo)

    def _routed(self, stream: Tensor) -> Tensor:
        if self._images is None:
            return torch.ones(stream.shape[:2], dtype=torch.bool, device=stream.device)
        return self._images.among(stream)

    def _block(self, original: Forward, block: Block, share: float) -> Forward:
        number, sparing = block.address.block, Sparing(self._model, block)
        level = self._routers.level(number, share) if share > 0 else float("inf")
        level = level if share < 1 else float("-inf")

        def forward(*args: Any, **kwargs: Any) -> Any:
            stream = stream_in(*args, **kwargs)
            routed = self._routed(stream)
            score = self._routers.score(number, stream)
            runs = ~routed | (score >= level)
            some = not bool(runs.all())
            output = self._spared(original, sparing, runs, args, kwargs) if some else original(*args, **kwargs)
            self._count(block, runs)
            after = stream_out(output)
            handed_on = self._routers.handed_on(stream, after, score, runs)
            left = torch.where(routed[..., None], handed_on, after)
            return with_stream(output, left)

        return forward

    @staticmethod
    def _spared(
        original: Callable[..., Any], sparing: Sparing, runs: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        sparing.on(runs)
        try:
            return original(*args, **kwargs)
        finally:
            sparing.off()

    def _count(self, block: Block, runs: Tensor) -> None:
        ran, tokens = int(runs.sum()), runs.numel()
        for sub in block.sublayers:
            self._counts.ran[sub.address] += ran
            self._counts.skipped[sub.address] += tokens - ran
            if sub.kind != "mlp":
                self._counts.projected[sub.address] += tokens - ran
