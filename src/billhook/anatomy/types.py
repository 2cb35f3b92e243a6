"""Where things are in one live model. Paths are module paths from the root, as in ``model.get_submodule(path)``."""

from __future__ import annotations

from dataclasses import dataclass

from billhook.plan.address import Address
from billhook.plan.outline import Outline


@dataclass(frozen=True)
class Cut:
    """How one module is silenced: ``path`` is replaced by the stub of that name (see ``anatomy.stubs``)."""

    path: str
    stub: str


@dataclass(frozen=True)
class Sublayer:
    """One attention, cross-attention or MLP (mixture of experts included).

    ``module`` does the work. ``output`` is the module whose output is what the branch adds to the residual stream (or
    the stream with it added, where ``adds_residual``). ``reads`` and ``writes`` name the weights through which the
    sublayer reads from and writes to the stream: parameter names; a fused qkv is one read, a fused expert tensor one
    read or write. ``norms`` are those inside the branch and go with it. ``cuts`` silence the sublayer exactly: what
    remains computes stream + 0.
    """

    address: Address
    kind: str
    module: str
    output: str
    adds_residual: bool
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    norms: tuple[str, ...]
    cuts: tuple[Cut, ...]


@dataclass(frozen=True)
class Block:
    """One transformer layer. ``norms`` are those that act on the stream itself or serve several sublayers: they stay
    as long as the block does. ``parallel``: all sublayers read the stream as it enters the block; otherwise each reads
    what the one before it left."""

    address: Address
    path: str
    sublayers: tuple[Sublayer, ...]
    norms: tuple[str, ...]
    parallel: bool


@dataclass(frozen=True)
class Counter:
    """A number in a config that equals the number of blocks: ``owner`` is the path of the config object from the
    model (``config``, ``config.text_config``, ``decoder.config``), ``key`` the attribute."""

    owner: str
    key: str


@dataclass(frozen=True)
class Stack:
    """A list of blocks (``path`` is its ModuleList) through which one residual stream runs. ``counters`` are the
    config values that state its length, the first one being the one that is saved; ``final_norm`` may be absent."""

    name: str
    path: str
    blocks: tuple[Block, ...]
    counters: tuple[Counter, ...]
    final_norm: str | None
    causal: bool


@dataclass(frozen=True)
class Anatomy:
    """Everything Billhook knows of a model's structure. ``head`` is the output linear, ``embedding`` the input one;
    either may be absent (vision towers, bare encoders)."""

    family: str
    stacks: tuple[Stack, ...]
    embedding: str | None
    head: str | None
    outline: Outline

    def stack(self, name: str) -> Stack:
        return next(s for s in self.stacks if s.name == name)

    def block(self, address: Address) -> Block:
        return self.stack(address.stack).blocks[address.block]

    def sublayer(self, address: Address) -> Sublayer:
        return next(s for s in self.block(address).sublayers if s.address == address)
