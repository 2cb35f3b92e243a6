"""What a recipe is: a method in the words of Billhook."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from billhook.measure.ablation import Kind
from billhook.plan.masks import parse_pattern
from billhook.plan.target import Target
from billhook.scores import InnerUnit, Unit, named
from billhook.search.bases import Inputs
from billhook.search.ranks import Spread
from billhook.search.sparsity import By
from billhook.search.width import Allocation


class _Words(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Line = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Per = Literal["unit", "budget"]
Heal = Literal[
    "none",
    "closed-form",
    "bias",
    "data-free",
    "scales",
    "tune",
    "lora",
    "distill",
    "lisa",
    "ist",
    "fpf",
    "skips",
    "kv-routing",
]
GOALS = {"kl": "divergence from dense", "loss": "loss"}
TRAINED = ("tune", "lora", "distill", "lisa", "ist", "fpf", "skips", "kv-routing")
Act = Literal["drop", "average", "fuse", "gains", "merge", "share", "flatten", "restore", "scale"]
BLIND_WIDTHS = ("random", "evenly-spaced")


class Paper(_Words):
    """Where a method comes from."""

    citation: Line
    link: Annotated[str, StringConstraints(pattern=r"^https://\S+$")]


class Score(_Words):
    """The word of a score, with its parameters (the unit is the recipe's)."""

    word: str
    parameters: dict[str, Any] = {}

    def asked(self, unit: str) -> dict[str, Any]:
        """The parameters for the score, with the unit where it asks for one."""
        asks = "unit" in named(self.word).parameters.model_fields
        return {**({"unit": unit} if asks else {}), **self.parameters}


class OneShot(_Words):
    """Rank once by the score (``per`` unit, or for what a unit gains of the budget), drop from the bottom."""

    word: Literal["one-shot"]
    per: Per = "unit"


class Knapsack(_Words):
    """Of all sets of units that meet the budget, drop the one whose scores add up to least."""

    word: Literal["knapsack"]


class Greedy(_Words):
    """Drop the unit that hurts the objective least, look again, and so on. ``lazy``: only at units whose old figure
    puts them on top. What hurts is counted ``per`` unit, or for what a unit gains of the budget. ``screen``: every unit
    is looked at first on this share of the calibration only, and on all of it when it comes out on top. ``refine``:
    exchanges afterwards, for at most so many times the work spent until then."""

    word: Literal["greedy"]
    lazy: bool = True
    per: Per = "budget"
    screen: Annotated[float, Field(gt=0, le=1)] = 1.0
    refine: Annotated[float, Field(ge=0, le=10)] = 0.0

    @model_validator(mode="after")
    def _screens_only_where_lazy(self) -> Self:
        if self.screen < 1 and not self.lazy:
            raise ValueError("plain greedy looks at every unit again each time: it has no use for screen")
        return self


class Screen(_Words):
    """Who is looked at on a ``share`` of the calibration, and how many ``survivors`` go on to the next look."""

    share: Annotated[float, Field(gt=0, lt=1)]
    survivors: Annotated[int, Field(ge=1)]


class Evolve(_Words):
    """Mutants of the best solution so far, ``offspring`` of them a generation, first looked at on little text
    (``screens``), the survivors on all of it. Ends after ``generations``, or ``patience`` of them without progress.
    Begins at what a greedy choice finds (its ``start``), or at random."""

    word: Literal["evolve"]
    generations: Annotated[int, Field(ge=1)]
    offspring: Annotated[int, Field(ge=2)]
    patience: Annotated[int, Field(ge=1)]
    screens: tuple[Screen, ...] = ()
    start: Greedy | None = None


class Trained(_Words):
    """Gates of all units trained at once for so many ``steps``, the units that are shut furthest going."""

    word: Literal["gates"]
    steps: Annotated[int, Field(ge=4)]


class Sampled(_Words):
    """Masks sampled for so many ``steps``, from logits that learn by gradients at ``rate``. ``low_rank``: the rank of
    an update of the weights that is trained along and stands in for a later recovery; 0 for none."""

    word: Literal["sampled-masks"]
    steps: Annotated[int, Field(ge=4)]
    rate: Annotated[float, Field(gt=0)] = 0.3
    low_rank: Annotated[int, Field(ge=0)] = 0


class Bandit(_Words):
    """Random choices tried, ``draws`` of them on the same text in each of so many ``rounds``, and units told apart by
    what they earn. ``rate``: how far one round moves what a unit is thought to be worth. ``adapters``: the width of
    small networks trained in the place of what is skipped; 0 for none."""

    word: Literal["bandit"]
    rounds: Annotated[int, Field(ge=1)]
    draws: Annotated[int, Field(ge=2)] = 3
    rate: Annotated[float, Field(gt=0)] = 1.0
    adapters: Annotated[int, Field(ge=0)] = 0


class Span(_Words):
    """The run of adjacent blocks over which the stream turns least."""

    word: Literal["span"]


class Coarse(_Words):
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


class Widths(_Words):
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


class Masks(_Words):
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


class LearnedMasks(_Words):
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


class SparseTraining(_Words):
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


class GroupSparse(_Words):
    """Train all that holds inner units while those that are to go shrink to zero, for so many ``steps`` on a window
    each; before, candidates are shrunk on trial and looked at again, for at most so many ``cycles``."""

    word: Literal["group-sparse"]
    steps: Annotated[int, Field(ge=2)]
    cycles: Annotated[int, Field(ge=1)]


class Ranks(_Words):
    """Put two linears in the place of one, of ranks that the ``allocation`` shares out (see ``search.ranks``), by the
    directions in which its output has most energy, on ``inputs`` as they are measured (see ``search.bases``). The
    ``inputs``: none, all alike; channels, weighed by their mean size; moments, with all of their second moments. The
    ``allocation``: uniform, every linear keeps the same share; global, least energy is lost over all. ``steps``: for so
    many both linears are trained first, the last ranks being dropped at random (see ``search.nested``)."""

    word: Literal["ranks"]
    inputs: Inputs
    allocation: Spread
    steps: Annotated[int, Field(ge=4)] | None = None


class Thinned(_Words):
    """Make the residual stream itself narrower: its least important hidden channels go from the whole model, as many as
    the budget asks for. The number left is a ``multiple_of`` this, and of what the model's config takes."""

    word: Literal["channels"]
    multiple_of: Annotated[int, Field(ge=1)] = 1


class BiMask(_Words):
    """Importance of units and widths of sublayers learned at once for so many ``steps``, by a mask that goes over from
    the one to the other; then the units that the mask lets through least go."""

    word: Literal["bi-mask"]
    steps: Annotated[int, Field(ge=4)]


class RestoredSpan(_Words):
    """The run of adjacent blocks which, put back to the base, makes answers that are to be one random character most
    diverse. The ``validity`` is the share of the valid answers that must be left."""

    word: Literal["restored-span"]
    validity: Annotated[float, Field(gt=0, le=1)]


class Graded(_Words):
    """Every block by its depth: what training changed is kept to a share that goes evenly from that of the ``first``
    block to that of the ``last``."""

    word: Literal["graded"]
    first: Annotated[float, Field(ge=0)]
    last: Annotated[float, Field(ge=0)]


class Baseline(_Words):
    """A choice that looks at nothing."""

    word: Literal["random", "evenly-spaced", "evenly-kept", "first", "last"]


class Recipe(_Words):
    """A method: what is measured, how units are chosen by it, and what is done to them.

    A one-shot choice, a knapsack, widths and channels have a ``score``; a greedy, evolutionary or learned one (gates,
    sampled masks, bandit: those by ``loss`` only; what is trained by ``loss`` or ``kl``) has an ``objective``, which is
    to be kept low: the divergence from the dense model's next tokens ``kl``, the ``loss`` on the text, the error of
    the last ``stream``, or one of three distances of the output (see ``measure.distances``).
    """

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
    title: Line
    paper: Paper | None = None
    unit: Literal[Unit, InnerUnit, "weight", "linear", "channel"]
    score: Score | None = None
    objective: Kind | None = None
    choice: Annotated[
        OneShot
        | Knapsack
        | Greedy
        | Evolve
        | Trained
        | Sampled
        | Bandit
        | Span
        | Widths
        | BiMask
        | Masks
        | LearnedMasks
        | SparseTraining
        | GroupSparse
        | Ranks
        | RestoredSpan
        | Graded
        | Thinned
        | Baseline,
        Field(discriminator="word"),
    ]
    act: Act = "drop"
    heal: Heal = "none"
    note: Line | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.score is not None) != (self.choice.word in ("one-shot", "knapsack", "widths", "channels")):
            raise ValueError("one-shot, knapsack, widths and channels need a score, and no other choice has one")
        thin = self.choice.word == "channels"
        if (self.unit == "channel") != thin and not (self.unit == "channel" and self.choice.word in BLIND_WIDTHS):
            raise ValueError("hidden channels go with the choices channels, random and evenly-spaced")
        if self.unit == "channel" and (self.act != "drop" or self.heal not in ("none", "closed-form")):
            raise ValueError("hidden channels are healed in closed form, or not")
        if self.score is not None and (named(self.score.word).needs == "stream") != (self.unit == "channel"):
            raise ValueError(f"score {self.score.word} is not one of {self.unit}s")
        learned = isinstance(self.choice, Trained | Sampled | Bandit)
        if (self.unit == "weight") != isinstance(self.choice, Masks | LearnedMasks | SparseTraining):
            raise ValueError(
                "single weights go with the choices masks, learned-masks and sparse-training, and masks with the unit "
                "weight"
            )
        if self.unit == "weight" and (self.heal != "none" or self.act != "drop"):
            raise ValueError("masks go with heal none and act drop: what stays gets new weights by the choice alone")
        if (self.unit == "linear") != (self.choice.word == "ranks"):
            raise ValueError("the unit linear goes with the choice ranks, others do not")
        if self.unit == "linear" and (self.act != "drop" or self.heal not in ("none", "closed-form")):
            raise ValueError("linears in two parts are healed in closed form, or not")
        if self.learns_ranks and self.heal != "none":
            raise ValueError("ranks that are learned bring new weights along: they go with heal none")
        ways_back = {"restored-span": "restore", "graded": "scale"}
        if ways_back.get(self.choice.word) != (self.act if self.returns else None):
            raise ValueError("act restore goes with the choice restored-span, act scale with graded, and others do not")
        if self.returns and (self.unit != "block" or self.heal != "none"):
            raise ValueError(f"act {self.act} takes whole blocks back to a base: unit must be block, and heal none")
        narrowing = isinstance(self.choice, Widths | BiMask | GroupSparse)
        if self.wide != narrowing and not (self.wide and self.choice.word in BLIND_WIDTHS):
            raise ValueError(
                "units inside sublayers (neuron, group, width, expert) go with the choices widths, bi-mask, "
                "group-sparse, random and evenly-spaced, and others do not go with the first three"
            )
        if self.choice.word == "bi-mask" and self.unit == "expert":
            raise ValueError("a bi-mask is of what linears are given: unit must be neuron, group or width")
        if isinstance(self.choice, GroupSparse) and (self.unit == "expert" or self.heal != "none"):
            raise ValueError("group-sparse trains neurons and groups, and what is left: it goes with heal none")
        if self.score is not None and named(self.score.word).wide != self.wide:
            raise ValueError(f"score {self.score.word} is not one of {self.unit}s")
        if self.score is not None and (named(self.score.word).needs == "routing") != (self.unit == "expert"):
            raise ValueError(f"score {self.score.word} is not one of {self.unit}s: experts have those of their router")
        if self.score is not None and named(self.score.word).needs == "knockouts" and self.unit != "group":
            raise ValueError(f"score {self.score.word} takes a pass for each unit: unit must be group")
        if (self.objective is not None) != (learned or self.trains or self.choice.word in ("greedy", "evolve")):
            raise ValueError("a greedy, evolve or learned choice needs an objective (such as kl), and no other has one")
        if self.trains and self.objective not in ("kl", "loss"):
            raise ValueError(f"choice {self.choice.word} is trained: objective must be kl or loss")
        if learned and self.objective != "loss":
            raise ValueError(f"choice {self.choice.word} learns from the loss alone: objective must be loss")
        if self.choice.word == "span" and self.unit != "block":
            raise ValueError("a span consists of whole blocks: unit must be block")
        if self.act in ("average", "fuse", "share", "flatten") and self.unit != "block":
            raise ValueError(f"act {self.act} combines whole blocks: unit must be block")
        if self.heal in ("bias", "data-free") and not self.wide:
            raise ValueError(f"heal {self.heal} makes up for units inside sublayers, which {self.unit} has none of")
        features = self.score is not None and self.score.word == "feature-merging"
        if self.act == "merge" and self.unit != "expert" and not features:
            raise ValueError("act merge combines experts, or neurons by the score feature-merging")
        if features and (self.unit != "neuron" or self.choice != Widths(word="widths", allocation="global")):
            raise ValueError("score feature-merging is one of neurons, of all blocks alike: allocation must be global")
        if getattr(self.choice, "apart", None) is not None and (self.act, self.unit) != ("merge", "expert"):
            raise ValueError("only merged experts are taken apart: act must be merge")
        if self.act not in ("drop", "merge") and self.wide:
            raise ValueError(
                f"act {self.act} works on what drops leave: units inside sublayers are healed by closed-form"
            )
        if self.act == "share" and self.heal != "none":
            raise ValueError("act share leaves a model that cannot be healed: it goes with heal none")
        if self.act != "drop" and self.heal != "none":
            raise ValueError(f"act {self.act} makes the new weights itself: it goes with heal none")
        if self.heal == "scales" and not self.wide:
            raise ValueError("heal scales tunes the units that a narrowing leaves: unit must be one inside sublayers")
        if self.score is not None:
            named(self.score.word).check(self.score_parameters)
        return self

    @property
    def trains(self) -> bool:
        """Whether the choice is a training, which reads more text than a measurement."""
        return isinstance(self.choice, LearnedMasks | SparseTraining | GroupSparse)

    @property
    def makes(self) -> str:
        """What new weights that come with the choice are called in a record."""
        return "nested-ranks" if self.learns_ranks else self.choice.word if self.trains else "second-order"

    @property
    def learns_ranks(self) -> bool:
        """Whether linears in two parts are trained before their ranks are chosen."""
        return isinstance(self.choice, Ranks) and self.choice.steps is not None

    @property
    def wide(self) -> bool:
        """Whether units inside sublayers go."""
        return self.unit in get_args(InnerUnit)

    @property
    def returns(self) -> bool:
        """Whether it takes a model part of the way back to its base, and cuts nothing."""
        return self.act in ("restore", "scale")

    @property
    def aim(self) -> Target:
        """Who can load what it leaves, where no target is given: anybody if whole blocks go, or equally many experts of
        each mixture, or hidden channels, or only single weights."""
        alike = self.unit == "expert" and getattr(self.choice, "allocation", "uniform") == "uniform"
        alike = alike and getattr(self.choice, "apart", None) is None
        whole = self.unit in ("block", "weight", "channel") and self.act != "share"
        return Target.UNIFORM if whole or alike else Target.REMOTE

    @property
    def score_parameters(self) -> dict[str, Any]:
        """The parameters for the score, with the recipe's unit where the score asks for one."""
        return self.score.asked(self.unit) if self.score is not None else {}
