"""The anatomy on paper: what a model consists of, in plain numbers.

An outline is made by ``anatomy`` from a live model; everything that only needs to count (the budget, the cost model,
the check of a plan, the report) works on it and needs neither weights nor torch.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict

from billhook.plan.address import Address
from billhook.plan.target import Target


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SublayerOutline(_Record):
    """One sublayer. Sizes that do not apply are 0.

    ``params`` counts everything that goes when the sublayer is dropped (its linears, biases, inner norms and the norms
    of its branch). ``active_params`` counts the weights that one token multiplies with: below ``params`` for
    mixture-of-experts. ``window`` is the sliding window in tokens, None for full attention. ``cache_width`` is the
    number of cached values per token (keys and values together).
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


class BlockOutline(_Record):
    """One block: its sublayers in order of execution, and the parameters that belong to no single one of them
    (norms on the stream itself, or shared by both sublayers)."""

    sublayers: dict[str, SublayerOutline]
    rest_params: int = 0

    @property
    def params(self) -> int:
        return self.rest_params + sum(s.params for s in self.sublayers.values())


class StackOutline(_Record):
    name: str
    hidden_size: int
    causal: bool
    blocks: tuple[BlockOutline, ...]


class Outline(_Record):
    """A whole model.

    ``other_params`` are those outside the blocks (embeddings, head, final norms), tied weights counted once;
    ``head_params`` those that each produced token multiplies with; ``bytes_per_param`` is that of the stored dtype.
    ``refused`` maps a target to the reason why no plan for it can be carried by this family; ``pinned`` maps an address
    that cannot be dropped to the reason why; ``not_shorter`` maps a stack to the one it must be at least as long as.
    """

    family: str
    stacks: tuple[StackOutline, ...]
    other_params: int
    head_params: int
    bytes_per_param: float
    refused: dict[Target, str] = {}
    pinned: dict[str, str] = {}
    not_shorter: dict[str, str] = {}

    @property
    def block_params(self) -> int:
        """Parameters inside the blocks: what ``params`` budgets count."""
        return sum(block.params for stack in self.stacks for block in stack.blocks)

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
