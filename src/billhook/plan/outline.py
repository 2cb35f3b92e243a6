"""The anatomy on paper: what a model consists of, in plain numbers.

An outline is made by ``anatomy`` from a live model; everything that only needs to count (the budget, the cost model,
the check of a plan, the report) works on it and needs neither weights nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from pydantic import BaseModel, ConfigDict

from billhook.plan.address import Address
from billhook.plan.target import Target


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InnerOutline(_Record):
    """The inner units of one kind in a sublayer (neurons, KV groups or experts), ``count`` of them.

    The other figures are those of one unit: its ``params`` and those that every token multiplies with (of an expert
    only its share of the router), its query heads, its heads in the cache, the cached values per token that are its
    own. ``key`` names the config value that states the size (``config.intermediate_size``), ``amount`` a unit; empty
    where no config value can say it. Where ``divides`` is not 0 that value must divide it. At least ``least`` units
    must stay, of each of ``parts`` equal runs as many as of the others. ``channel_params`` and ``channel_active`` are
    how many parameters, and of those that a token multiplies with, a unit has for each channel of the residual stream.
    """

    count: int
    params: int
    active_params: int
    heads: int = 0
    kv_heads: int = 0
    cache_width: int = 0
    key: str = ""
    amount: int = 1
    divides: int = 0
    least: int = 1
    parts: int = 1
    channel_params: int = 0
    channel_active: int = 0

    def thinned(self, gone: int) -> InnerOutline:
        """The same unit with so many channels of the residual stream gone."""
        return self.model_copy(
            update={
                "params": self.params - gone * self.channel_params,
                "active_params": self.active_params - gone * self.channel_active,
            }
        )


class LinearOutline(_Record):
    """A linear that can be taken apart, [outputs, inputs]."""

    outputs: int
    inputs: int

    @property
    def params(self) -> int:
        return self.outputs * self.inputs

    @property
    def useful(self) -> int:
        """The largest rank at which two linears have fewer parameters than one; 0 where none has."""
        return (self.params - 1) // (self.outputs + self.inputs)

    def saved(self, rank: int) -> int:
        """How many parameters fewer two linears have, ``rank`` wide in between."""
        return self.params - rank * (self.outputs + self.inputs)


class MixtureOutline(_Record):
    """The experts of a mixture, where each can be taken apart: some of its ``neurons`` stay whole, and the linears of
    the others, ``hidden`` wide outside, become two."""

    experts: int
    hidden: int
    neurons: int

    @property
    def useful(self) -> int:
        """The largest rank that saves parameters; half of the neurons at most, 0 where none does."""
        h, n = self.hidden, self.neurons
        root = (5 * h + 3 * n - math.sqrt((5 * h + 3 * n) ** 2 - 36 * h * n)) / 6  # where ``saved_each`` is zero
        ranks = range(min(math.ceil(root), n // 2, h), 0, -1)
        return next((rank for rank in ranks if self.saved_each(rank) > 0), 0)

    def saved_each(self, rank: int) -> int:
        """How many parameters fewer an expert has with ``rank`` neurons whole and the linears of the others in two,
        ``rank`` wide in between: gate and up as one, and down."""
        h, n = self.hidden, self.neurons - rank
        return 3 * h * n - rank * (2 * n + h) - rank * (n + h)


class SublayerOutline(_Record):
    """One sublayer. Sizes that do not apply are 0.

    ``params`` counts everything that goes when the sublayer is dropped (its linears, biases, inner norms and the norms
    of its branch), ``linear_params`` those of its linears alone, which may lose single weights, before any narrowing.
    ``active_params`` counts the weights that one token multiplies with: below ``params`` for mixture-of-experts.
    ``window`` is the sliding window in tokens, None for full attention. ``cache_width`` is the number of cached values
    per token (keys and values together). ``inner`` are the units that can be cut from it, by kind; ``rigid`` says why
    there are none. ``linears`` are those that can be taken apart, by their path in the block, and so are ``mixtures``.
    ``channel_params`` and ``channel_active`` are counted for each channel of the residual stream.
    """

    params: int
    active_params: int
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    neurons: int = 0
    experts: int = 0
    active_experts: int = 0
    window: int | None = None
    cache_width: int = 0
    linear_params: int = 0
    inner: dict[str, InnerOutline] = {}
    rigid: str = ""
    linears: dict[str, LinearOutline] = {}
    mixtures: dict[str, MixtureOutline] = {}
    channel_params: int = 0
    channel_active: int = 0

    def thinned(self, gone: int) -> SublayerOutline:
        """The same sublayer with so many channels of the residual stream gone."""
        return self.model_copy(
            update={
                "params": self.params - gone * self.channel_params,
                "active_params": self.active_params - gone * self.channel_active,
                "inner": {kind: unit.thinned(gone) for kind, unit in self.inner.items()},
                "linears": {},
                "mixtures": {},
            }
        )

    @property
    def useful(self) -> dict[str, int]:
        """The largest useful rank of whatever can be taken apart, by path."""
        linears = {path: linear.useful for path, linear in self.linears.items()}
        return linears | {path: mixture.useful for path, mixture in self.mixtures.items()}

    def factorised(self, linear: str, rank: int) -> SublayerOutline:
        """The same sublayer with one of its linears in two, ``rank`` wide in between, or its experts taken apart."""
        if linear in self.mixtures:
            each = self.mixtures[linear].saved_each(rank)
            gone = {"params": self.params - self.experts * each}
            gone["active_params"] = self.active_params - self.active_experts * each
            return self.model_copy(update={**gone, "mixtures": {}})
        saved = self.linears[linear].saved(rank)
        left = {name: other for name, other in self.linears.items() if name != linear}
        less = {"params": self.params - saved, "active_params": self.active_params - saved}
        return self.model_copy(update={**less, "linears": left})

    def narrowed(self, kind: str, count: int) -> SublayerOutline:
        """The same sublayer with only ``count`` of its inner units of one kind."""
        unit = self.inner[kind]
        gone = unit.count - count
        left = {"neuron": "neurons", "expert": "experts"}
        return self.model_copy(
            update={
                "params": self.params - gone * unit.params,
                "active_params": self.active_params - gone * unit.active_params,
                "channel_params": self.channel_params - gone * unit.channel_params,
                "channel_active": self.channel_active - gone * unit.channel_active,
                "heads": self.heads - gone * unit.heads,
                "kv_heads": self.kv_heads - gone * unit.kv_heads,
                "cache_width": self.cache_width - gone * unit.cache_width,
                "inner": {**self.inner, kind: unit.model_copy(update={"count": count})},
                **({left[kind]: count} if kind in left else {}),
            }
        )


class BlockOutline(_Record):
    """One block: its sublayers in order of execution, and the parameters that belong to no single one of them
    (norms on the stream itself, or shared by both sublayers); ``rest_channel_params`` of those are for each channel of
    the stream, ``bridge_params`` those of a bridge behind it, which every token takes."""

    sublayers: dict[str, SublayerOutline]
    rest_params: int = 0
    bridge_params: int = 0
    rest_channel_params: int = 0

    def thinned(self, gone: int) -> BlockOutline:
        """The same block with so many channels of the residual stream gone."""
        sublayers = {kind: part.thinned(gone) for kind, part in self.sublayers.items()}
        rest = self.rest_params - gone * self.rest_channel_params
        return self.model_copy(update={"sublayers": sublayers, "rest_params": rest})

    @property
    def params(self) -> int:
        return self.rest_params + sum(s.params for s in self.sublayers.values())


class StackOutline(_Record):
    """A stack of blocks on one residual stream. Of its channels ``channel_multiple`` says what the number left must be
    a multiple of; 0 where none can go, for the reason ``rigid``."""

    name: str
    hidden_size: int
    causal: bool
    blocks: tuple[BlockOutline, ...]
    channel_multiple: int = 0
    rigid: str = ""


class Outline(_Record):
    """A whole model.

    ``other_params`` are those outside the blocks (embeddings, head, final norms), tied weights counted once;
    ``head_params`` those that each produced token multiplies with; ``bytes_per_param`` is that of the stored dtype.
    ``refused`` maps a target to the reason why no plan for it can be carried by this family; ``pinned`` maps an address
    that cannot be dropped to the reason why; ``not_shorter`` maps a stack to the one it must be at least as long as.
    ``other_channel_params`` and ``head_channel_params`` are counted for each channel of the residual stream.
    """

    family: str
    stacks: tuple[StackOutline, ...]
    other_params: int
    head_params: int
    bytes_per_param: float
    refused: dict[Target, str] = {}
    pinned: dict[str, str] = {}
    not_shorter: dict[str, str] = {}
    other_channel_params: int = 0
    head_channel_params: int = 0

    @property
    def block_params(self) -> int:
        """Parameters inside the blocks: what ``params`` budgets count."""
        return sum(block.params for stack in self.stacks for block in stack.blocks)

    def narrowed(self, counts: Mapping[tuple[Address, str], int]) -> Outline:
        """The outline of the model that has only so many units of a kind in these sublayers."""
        stacks = {stack.name: list(stack.blocks) for stack in self.stacks}
        for (address, kind), count in counts.items():
            block = stacks[address.stack][address.block]
            part = str(address.sublayer)
            parts = {**block.sublayers, part: block.sublayers[part].narrowed(kind, count)}
            stacks[address.stack][address.block] = block.model_copy(update={"sublayers": parts})
        drawn = (stack.model_copy(update={"blocks": tuple(stacks[stack.name])}) for stack in self.stacks)
        return self.model_copy(update={"stacks": tuple(drawn)})

    def thinned(self, channels: Mapping[str, int]) -> Outline:
        """The outline of the model in which the residual streams of these stacks have only so many channels."""
        stacks, gone = [], 0
        for stack in self.stacks:
            fewer = stack.hidden_size - channels.get(stack.name, stack.hidden_size)
            gone += fewer
            blocks = tuple(block.thinned(fewer) for block in stack.blocks) if fewer else stack.blocks
            hidden = stack.hidden_size - fewer
            stacks.append(stack.model_copy(update={"blocks": blocks, "hidden_size": hidden}))
        return self.model_copy(
            update={
                "stacks": tuple(stacks),
                "other_params": self.other_params - gone * self.other_channel_params,
                "head_params": self.head_params - gone * self.head_channel_params,
            }
        )

    def inner_share(self, unit: Address) -> float:
        """What share of the weights that a token multiplies with belongs to the inner units that may be left out for
        it: the experts picked in a mixture, the neurons of any other MLP."""
        mlp = self.stack(unit.stack).blocks[unit.block].sublayers[str(unit.sublayer)]
        if "expert" not in mlp.inner:
            return mlp.inner["neuron"].active_params * mlp.inner["neuron"].count / mlp.active_params
        expert = mlp.inner["expert"]
        return (expert.params - expert.active_params) * mlp.active_experts / mlp.active_params

    def stack(self, name: str) -> StackOutline:
        return next(s for s in self.stacks if s.name == name)

    def blocks(self) -> Iterator[tuple[Address, BlockOutline]]:
        for stack in self.stacks:
            for index, block in enumerate(stack.blocks):
                yield Address(stack.name, index), block

    def sublayers(self) -> Iterator[tuple[Address, SublayerOutline]]:
        for address, block in self.blocks():
            for kind, sublayer in block.sublayers.items():
                yield Address(address.stack, address.block, kind), sublayer
