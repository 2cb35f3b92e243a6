"""The words of a recipe that say how units are chosen."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from billhook.plan.masks import parse_pattern
from billhook.scores import named
from billhook.search.bases import Inputs
from billhook.search.ranks import Spread
from billhook.search.sparsity import By
from billhook.search.width import Allocation


class Words(BaseModel):
    """Nothing but what is said here, in finite numbers, and it stays."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Per = Literal["unit", "budget"]


class Score(Words):
    """The word of a score, with its parameters (the unit is the recipe's)."""

    word: str
    parameters: dict[str, Any] = {}

    def asked(self, unit: str) -> dict[str, Any]:
        """The parameters for the score, with the unit where it asks for one."""
        asks = "unit" in named(self.word).parameters.model_fields
        return {**({"unit": unit} if asks else {}), **self.parameters}


class OneShot(Words):
    """Rank once by the score (``per`` unit, or for what a unit gains of the budget), drop from the bottom."""

    word: Literal["one-shot"]
    per: Per = "unit"


class Knapsack(Words):
    """Of all sets of units that meet the budget, drop the one whose scores add up to least."""

    word: Literal["knapsack"]


class Greedy(Words):
    """Drop the unit that hurts the objective least, look again, and so on. ``lazy``: only at units whose old figure
    puts them on top. What hurts is counted ``per`` unit, or for what a unit gains of the budget. ``screen``: every unit
    is looked at first on this share of the calibration only, and on all of it when it comes out on top. ``refine``:
    exchanges afterwards, for at most so many times the work spent until then; they go by the budget."""

    word: Literal["greedy"]
    lazy: bool = True
    per: Per = "budget"
    screen: Annotated[float, Field(gt=0, le=1)] = 1.0
    refine: Annotated[float, Field(ge=0, le=10)] = 0.0

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.screen < 1 and not self.lazy:
            raise ValueError("plain greedy looks at every unit again each time: it has no use for screen")
        if self.refine > 0 and self.per == "unit":
            raise ValueError("exchanges go by what a unit gains of the budget: refine goes with per budget")
        return self


class Screen(Words):
    """Who is looked at on a ``share`` of the calibration, and how many ``survivors`` go on to the next look."""

    share: Annotated[float, Field(gt=0, lt=1)]
    survivors: Annotated[int, Field(ge=1)]


class Evolve(Words):
    """Mutants of the best solution so far, ``offspring`` of them a generation, first looked at on little text
    (``screens``), the survivors on all of it. Ends after ``generations``, or ``patience`` of them without progress.
    Begins at what a greedy choice finds (its ``start``), or at random; inside sublayers it is their widths that
    evolve, from equal shares on."""

    word: Literal["evolve"]
    generations: Annotated[int, Field(ge=1)]
    offspring: Annotated[int, Field(ge=2)]
    patience: Annotated[int, Field(ge=1)]
    screens: tuple[Screen, ...] = ()
    start: Greedy | None = None

    @model_validator(mode="after")
    def _looks_closer_at_fewer(self) -> Self:
        shares = [screen.share for screen in self.screens]
        counts = [self.offspring, *(screen.survivors for screen in self.screens)]
        if shares != sorted(set(shares)) or counts != sorted(counts, reverse=True):
            raise ValueError("each screen takes a larger share than the one before, and lets no more survive than came")
        return self


class Trained(Words):
    """Gates of all units trained at once for so many ``steps``, the units that are shut furthest going."""

    word: Literal["gates"]
    steps: Annotated[int, Field(ge=4)]


class Sampled(Words):
    """Masks sampled for so many ``steps``, from logits that learn by gradients at ``rate``. ``low_rank``: the rank of
    an update of the weights that is trained along and stands in for a later recovery; 0 for none."""

    word: Literal["sampled-masks"]
    steps: Annotated[int, Field(ge=4)]
    rate: Annotated[float, Field(gt=0)] = 0.3
    low_rank: Annotated[int, Field(ge=0)] = 0


class Bandit(Words):
    """Random choices tried, ``draws`` of them on the same text in each of so many ``rounds``, and units told apart by
    what they earn. ``rate``: how far one round moves what a unit is thought to be worth. ``adapters``: the width of
    small networks trained in the place of what is skipped; 0 for none."""

    word: Literal["bandit"]
    rounds: Annotated[int, Field(ge=1)]
    draws: Annotated[int, Field(ge=2)] = 3
    rate: Annotated[float, Field(gt=0)] = 1.0
    adapters: Annotated[int, Field(ge=0)] = 0


class Span(Words):
    """The run of adjacent blocks over which the stream turns least."""

    word: Literal["span"]


class Coarse(Words):
    """Whole blocks go first, those of least ``score``, as long as they take no more than this ``share`` of what has to
    go."""

    score: Score
    share: Annotated[float, Field(gt=0, lt=1)]

    @model_validator(mode="after")
    def _scores_blocks(self) -> Self:
        if named(self.score.word).wide:
            raise ValueError(f"score {self.score.word} is one of units inside sublayers, not of blocks")
        named(self.score.word).check(self.score.asked("block"))
        return self


class Widths(Words):
    """Make sublayers narrower: their least important inner units go, set against those of other sublayers as the
    ``allocation`` says (see ``search.width``), ``per`` unit or for what a unit gains of the budget. An ``allocation``
    is uniform: all lose the same share; global: scores of all sublayers compare; standardised: the same after each
    sublayer's scores were brought to mean 0 and variance 1; shared: blocks that turn the stream less lose more; or
    measured: what narrowing each sublayer alone does to the output decides. The number of neurons left is a
    ``multiple_of`` this. Sharing alone has a ``steepness``, from equal shares at 0 on. A measured allocation alone
    looks at the divergence of narrowed models, on a ``screen``: this share of the calibration. Whole ``blocks`` may go
    first. Where experts are merged, those that stay may be taken ``apart`` for this share of what has to go: some of
    their neurons stay whole, the linears of the others become two of low rank.
    """

    word: Literal["widths"]
    allocation: Allocation
    per: Per = "unit"
    multiple_of: Annotated[int, Field(ge=1)] = 1
    steepness: Annotated[float, Field(ge=0)] | None = None
    screen: Annotated[float, Field(gt=0, le=1)] | None = None
    blocks: Coarse | None = None
    apart: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.steepness is not None) != (self.allocation == "shared"):
            raise ValueError("a shared allocation needs a steepness, and no other has one")
        if (self.screen is not None) != (self.allocation == "measured"):
            raise ValueError("a measured allocation needs a screen, and no other has one")
        if self.per == "budget" and self.allocation not in ("global", "measured"):
            raise ValueError("only a global or measured allocation goes by what a unit gains of the budget")
        return self


class Masks(Words):
    """Set the least important weights of every linear to zero, ``by`` magnitude, wanda or second-order (see
    ``search.sparsity``), in a ``pattern``: unstructured, or N:M, at most N of M inputs in a row. With the
    ``allocation`` uniform blocks lose alike, with zeroth-order the less the steeper the loss is in their weights (see
    ``search.zeroth_order``)."""

    word: Literal["masks"]
    by: By
    pattern: str = "unstructured"
    allocation: Literal["uniform", "zeroth-order"] = "uniform"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if parse_pattern(self.pattern) is not None and self.allocation != "uniform":
            raise ValueError("a pattern N:M takes as much from every block: its allocation is uniform")
        return self


class LearnedMasks(Words):
    """Learn for each M inputs of an output which mask of the ``pattern`` N:M they get, the weights fixed, in so many
    ``steps`` of training on a window each. It begins with the masks ``by`` magnitude, wanda or second-order (see
    ``search.sparsity``), or with those of an earlier result."""

    word: Literal["learned-masks"]
    by: By
    pattern: str
    steps: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        pattern = parse_pattern(self.pattern)
        if pattern is None or pattern[1] > 8:
            raise ValueError("masks are learned in a pattern N:M of 8 weights or fewer, such as 2:4")
        return self


class SparseTraining(Words):
    """Train weights and masks together, a window a step for so many ``steps``, by a ``rule``. The ``rule``
    low-rank-scores: few numbers learn which weights stay and how they change; decaying-flow: all weights train, and the
    smallest of each M inputs fade (see ``search.sparse_training``). What goes is in a ``pattern``: unstructured, within
    each linear, or N:M."""

    word: Literal["sparse-training"]
    rule: Literal["low-rank-scores", "decaying-flow"]
    pattern: str = "unstructured"
    steps: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if parse_pattern(self.pattern) is None and self.rule == "decaying-flow":
            raise ValueError("the flow decays within groups of weights: rule decaying-flow needs a pattern N:M")
        return self


class GroupSparse(Words):
    """Train all that holds inner units while those that are to go shrink to zero, for so many ``steps`` on a window
    each; before, candidates are shrunk on trial and looked at again, for at most so many ``cycles``."""

    word: Literal["group-sparse"]
    steps: Annotated[int, Field(ge=2)]
    cycles: Annotated[int, Field(ge=1)]


class Ranks(Words):
    """Put two linears in the place of one, of ranks that the ``allocation`` shares out (see ``search.ranks``), by the
    directions in which its output has most energy, on ``inputs`` as they are measured (see ``search.bases``). The
    ``inputs``: none, all alike; channels, weighed by their mean size; moments, with all of their second moments. The
    ``allocation``: uniform, every linear keeps the same share; global, least energy is lost over all. ``steps``: for so
    many both linears are trained first, the last ranks being dropped at random (see ``search.nested``)."""

    word: Literal["ranks"]
    inputs: Inputs
    allocation: Spread
    steps: Annotated[int, Field(ge=4)] | None = None


class Thinned(Words):
    """Make the residual stream itself narrower: its least important hidden channels go from the whole model, as many as
    the budget asks for. The number left is a ``multiple_of`` this, and of what the model's config takes."""

    word: Literal["channels"]
    multiple_of: Annotated[int, Field(ge=1)] = 1


class BiMask(Words):
    """Importance of units and widths of sublayers learned at once for so many ``steps``, by a mask that goes over from
    the one to the other; then the units that the mask lets through least go."""

    word: Literal["bi-mask"]
    steps: Annotated[int, Field(ge=4)]


class RestoredSpan(Words):
    """The run of adjacent blocks which, put back to the base, makes answers that are to be one random character most
    diverse. The ``validity`` is the share of the valid answers that must be left."""

    word: Literal["restored-span"]
    validity: Annotated[float, Field(gt=0, le=1)]


class Graded(Words):
    """Every block by its depth: what training changed is kept to a share that goes evenly from that of the ``first``
    block to that of the ``last``."""

    word: Literal["graded"]
    first: Annotated[float, Field(ge=0)]
    last: Annotated[float, Field(ge=0)]


class Baseline(Words):
    """A choice that looks at nothing."""

    word: Literal["random", "evenly-spaced", "evenly-kept", "first", "last"]
