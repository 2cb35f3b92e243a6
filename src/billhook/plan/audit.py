"""What a depth audit found of one stack. Pure data, for the record and the report.

A *depth* is a place in the residual stream: depth i is the input of block i, the last one is behind the last block.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Row = tuple[float | None, ...]
Matrix = tuple[Row, ...]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Transition(_Record):
    """The depth at which what blocks write changes at once: ``block`` is the first of the second part. ``step`` and
    ``slope`` are the shares of the variance that a step there and a straight line explain; ``found`` says whether the
    step counts as one (see ``measure.transition``). Means of size and alignment before and after it."""

    block: int
    found: bool
    step: float
    slope: float
    size: tuple[float, float]
    alignment: tuple[float, float]


class Skips(_Record):
    """What is left of a run when one block is skipped for the first half of each text.

    ``now[l][m]``: the mean relative change of what block m writes for the tokens for which block l was skipped;
    ``future[l][m]``: for the later tokens, none of which skipped anything. None where m is not behind l. ``output_now``
    and ``output_future``: the change of the output. The two of the future are empty for a stack that is not causal; it
    skips for all tokens.
    """

    now: Matrix
    future: Matrix
    output_now: Row
    output_future: Row


class Tokenwise(_Record):
    """One block's update, split into what an affine map of the same token's stream gives and the rest, on text that the
    map was not fitted on. ``explained``: the share of the update's energy; the two cosines: of the update with its
    tokenwise part and with the rest; ``output``: the change of the output with the map in the place of the block."""

    explained: float
    cosine_tokenwise: float
    cosine_rest: float
    output: float | None


class Stitches(_Record):
    """``output[a][b]``: the change of the output if depth ``depths[b]`` is given the affine image of the stream at
    ``depths[a]`` instead of its own."""

    depths: tuple[int, ...]
    output: Matrix


class StackAudit(_Record):
    """All that was found of one stack.

    ``size`` and ``alignment`` of units: ||written|| / ||stream|| and cos(stream, written), means over tokens.
    ``output`` is what a change of the output means: ``kl``, the divergence of the next-token distribution from the
    dense one in nats, or ``stream``, the squared error of the last stream relative to the dense one. ``r2[i][j]``: how
    much of the stream at depth j an affine map of that at depth i explains on text it was not fitted on; ``cka[i][j]``:
    their linear CKA; both over the ``depths``. ``neighbours[gap][depth]``: mean cosine of the centred stream of tokens
    that many apart. ``correlation``: Spearman's between the unexplained share of a block's update and the change of the
    output. None: not measured, with the reason in ``left_out``. ``work`` counts block-token forwards.
    """

    output: Literal["kl", "stream"]
    fitted: int
    held: int
    work: int
    size: dict[str, float]
    alignment: dict[str, float]
    transition: Transition | None
    depths: tuple[int, ...]
    r2: Matrix
    cka: Matrix
    neighbours: dict[int, Row]
    tokenwise: tuple[Tokenwise, ...]
    correlation: float | None
    skips: Skips | None
    stitches: Stitches | None
    left_out: str | None = None
