"""Where things are in one live model. Paths are module paths from the root, as in ``model.get_submodule(path)``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.outline import Outline


@dataclass(frozen=True)
class Cut:
    """How one module is silenced: ``path`` is replaced by the stub of that name (see ``anatomy.stubs``)."""

    path: str
    stub: str


@dataclass(frozen=True)
class Slice:
    """What inner units own of one tensor: along ``axis`` unit u holds the ``width`` entries from ``start + u * width``.

    ``parameter`` is the name of a parameter or buffer in the live model. A tensor that fuses several projections has
    one slice for each run of units: the gate half and the up half of ``gate_up_proj``, or q, k and v of ``qkv_proj``;
    where heads are interleaved (q, k and v of the first head, then of the second) one wide slice says it all. Together
    the slices of a tensor cover its axis.

    ``writes`` marks the weight through which the unit writes to the residual stream (down; o; an expert's down). For
    neurons and groups the same entries of that linear's *input* are the unit's activation.
    """

    parameter: str
    axis: int
    width: int = 1
    start: int = 0
    writes: bool = False


@dataclass(frozen=True)
class Inner:
    """The inner units of one kind in one sublayer, and all that has to be cut together with a unit.

    - ``neuron``: an MLP's inner channel: a row of gate and up with their biases, a column of down.
    - ``group``: a KV group: its query heads, its key and value head, their biases, its columns of o.
    - ``expert``: its weights, its row of the router and its entry of the router's bias.

    ``count`` is how many there are. ``attributes`` are numbers that modules keep of them, as (module path, attribute,
    amount a unit): 3 units of ``("layers.0.self_attn", "num_heads", 2)`` make ``num_heads`` 6; an attribute
    ``config.NAME`` is one that the module looks up in its config. ``keys`` are the values of the stack's config that
    state the size, as (key, amount a unit), empty where no config value can say it; ``states`` are values that the
    config must then state outright, because it works them out from the size otherwise. Where ``divides`` is not 0 the
    first key's value must divide it. At least ``least`` units must stay, of each of ``parts`` equal runs of units as
    many as of the others. Of a group ``heads`` counts the query heads.
    """

    kind: Literal["neuron", "group", "expert"]
    count: int
    slices: tuple[Slice, ...]
    attributes: tuple[tuple[str, str, int], ...] = ()
    keys: tuple[tuple[str, int], ...] = ()
    states: tuple[tuple[str, int], ...] = ()
    divides: int = 0
    least: int = 1
    parts: int = 1
    heads: int = 0


@dataclass(frozen=True)
class Residual:
    """The hidden channels of a residual stream, and all that has to be cut together with one.

    ``axes`` maps each tensor that has an entry a channel to the axis along which it has it. ``scales`` are those that
    are multiplied as well when channels go, as (parameter, power, offset): with r = sqrt(channels before / after), w
    becomes r^power (offset + w) - offset. ``attributes`` are numbers that modules keep of the channels (module path,
    attribute), ``shapes`` tuples of that one number; ``roots`` are the embeddings that the model multiplies by the root
    of it. ``states`` are values that the config must then state outright. The number left must be a multiple of
    ``multiple``.
    """

    stack: str
    count: int
    axes: tuple[tuple[str, int], ...]
    scales: tuple[tuple[str, int, float], ...] = ()
    attributes: tuple[tuple[str, str], ...] = ()
    shapes: tuple[tuple[str, str], ...] = ()
    roots: tuple[str, ...] = ()
    states: tuple[tuple[str, int], ...] = ()
    multiple: int = 1


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
    what the one before it left. ``lends``: later blocks read its keys and values."""

    address: Address
    path: str
    sublayers: tuple[Sublayer, ...]
    norms: tuple[str, ...]
    parallel: bool
    lends: bool = False


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
    either may be absent (vision towers, bare encoders). ``inner`` maps each sublayer to the kinds of inner units that
    can be cut from it; where there is none, ``rigid`` has the reason. ``residuals`` maps a stack to the channels of its
    stream where they can be cut."""

    family: str
    stacks: tuple[Stack, ...]
    embedding: str | None
    head: str | None
    outline: Outline
    inner: dict[Address, tuple[Inner, ...]] = field(default_factory=dict)
    rigid: dict[Address, str] = field(default_factory=dict)
    residuals: dict[str, Residual] = field(default_factory=dict)

    def stack(self, name: str) -> Stack:
        """The stack of that name. InputError with the list of names if there is none."""
        found = next((s for s in self.stacks if s.name == name), None)
        if found is None:
            raise InputError(f"this {self.family} model has no {name}; it has {', '.join(s.name for s in self.stacks)}")
        return found

    def block(self, address: Address) -> Block:
        return self.stack(address.stack).blocks[address.block]

    def sublayer(self, address: Address) -> Sublayer:
        return next(s for s in self.block(address).sublayers if s.address == address)
