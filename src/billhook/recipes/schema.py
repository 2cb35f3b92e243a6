"""What a recipe is: a method in the words of Billhook."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, StringConstraints, model_validator

from billhook.measure.ablation import Kind
from billhook.plan.heals import Heal
from billhook.plan.target import Target
from billhook.recipes.choices import (
    Bandit,
    Baseline,
    BiMask,
    Evolve,
    Graded,
    Greedy,
    GroupSparse,
    Knapsack,
    LearnedMasks,
    Masks,
    OneShot,
    Ranks,
    RestoredSpan,
    Sampled,
    Score,
    Span,
    SparseTraining,
    Thinned,
    Trained,
    Widths,
    Words,
)
from billhook.scores import InnerUnit, Unit, named

Line = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
OBJECTIVES: dict[Kind, str] = {
    "kl": "divergence from dense",
    "loss": "loss",
    "stream": "error of the last stream",
    "turn": "turn of the last stream",
    "angle": "angle of the output from dense",
    "euclidean": "distance of the output from dense",
    "jensen-shannon": "Jensen-Shannon divergence from dense",
}
Act = Literal["drop", "average", "fuse", "gains", "merge", "share", "flatten", "restore", "scale"]
SURVEYED = ("channels", "routing", "stream")
BLIND_WIDTHS = ("random", "evenly-spaced")


class Paper(Words):
    """Where a method comes from."""

    citation: Line
    link: Annotated[str, StringConstraints(pattern=r"^https://\S+$")]


class Recipe(Words):
    """A method: what is measured, how units are chosen by it, and what is done to them.

    A one-shot choice, a knapsack, widths (evolved ones too) and channels have a ``score``; a greedy, evolutionary or
    learned one (gates, sampled masks, bandit: those by ``loss`` only; what is trained by ``loss`` or ``kl``) has an
    ``objective``, which is to be kept low: the divergence from the dense model's next tokens ``kl``, the ``loss`` on
    the text, the error of the last ``stream``, or one of three distances of the output (see ``measure.distances``).
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
        evolved = self.wide and isinstance(self.choice, Evolve)
        if (self.score is not None) != (self.choice.word in ("one-shot", "knapsack", "widths", "channels") or evolved):
            raise ValueError(
                "one-shot, knapsack, widths and channels need a score, and no other choice has one but evolve inside "
                "sublayers"
            )
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
        if self.unit == "weight" and (self.heal not in ("none", "eora", "tune") or self.act != "drop"):
            raise ValueError("masks go with heal none, eora or tune, which leave zeros alone, and with act drop")
        if self.heal == "bridge":
            raise ValueError("a bridge adds to what a cut leaves, and is no heal of a recipe")
        if self.heal == "eora" and self.unit != "weight":
            raise ValueError(
                f"heal eora puts paths beside linears that lost single weights: unit must be weight, not {self.unit}"
            )
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
        if self.wide != narrowing and not evolved and not (self.wide and self.choice.word in BLIND_WIDTHS):
            raise ValueError(
                "units inside sublayers (neuron, group, width, expert) go with the choices widths, bi-mask, "
                "group-sparse, evolve, random and evenly-spaced, and others do not go with the first three"
            )
        if isinstance(self.choice, Evolve) and evolved and (self.unit == "expert" or self.choice.start is not None):
            raise ValueError("evolve inside sublayers begins at equal shares: unit must be neuron, group or width")
        if self.choice.word == "bi-mask" and self.unit == "expert":
            raise ValueError("a bi-mask is of what linears are given: unit must be neuron, group or width")
        if isinstance(self.choice, GroupSparse) and (self.unit == "expert" or self.heal != "none"):
            raise ValueError("group-sparse trains neurons and groups, and what is left: it goes with heal none")
        if self.score is not None and named(self.score.word).wide != self.wide:
            raise ValueError(f"score {self.score.word} is not one of {self.unit}s")
        if self.score is not None and named(self.score.word).of_blocks and self.unit != "block":
            raise ValueError(f"score {self.score.word} is one of whole blocks: unit must be block, not {self.unit}")
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
    def only_cuts(self) -> bool:
        """Whether its result is the dense model with something left out, no weight of what stays made anew."""
        return self.act == "drop" and self.unit != "weight" and not (self.trains or self.learns_ranks)

    @property
    def surveys(self) -> bool:
        """Whether the choice rests on statistics that one pass gives, so that it can afford far more text than one that
        asks the model again and again."""
        if isinstance(self.choice, Masks):
            return self.choice.by != "magnitude"
        if isinstance(self.choice, Ranks):
            return self.choice.inputs != "none" and not self.learns_ranks
        return self.score is not None and named(self.score.word).needs in SURVEYED

    @property
    def combines(self) -> bool:
        """Whether the act makes new weights for what stays, instead of only leaving something out."""
        return self.act not in ("drop", "share")

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
