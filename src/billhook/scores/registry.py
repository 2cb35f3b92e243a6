"""Words of a recipe and the functions they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from billhook.anatomy import Anatomy
from billhook.measure.sums import Trace
from billhook.measure.trace import Statistic
from billhook.measure.width import WidthTrace
from billhook.plan.address import Address
from billhook.plan.errors import InputError

Unit = Literal["block", "sublayer", "attention", "cross_attention", "mlp"]
InnerUnit = Literal["neuron", "group", "width", "expert"]
Needs = Literal[
    "change", "angular", "damage", "weights", "channels", "slopes", "routing", "knockouts", "adapters", "stream"
]
WIDE = ("weights", "channels", "slopes", "routing", "knockouts", "adapters")
Function = Callable[..., Mapping[Any, Any]]

SCORES: dict[str, Score] = {}


@dataclass(frozen=True)
class Score:
    """A criterion. ``needs`` says what the trace must hold: the ``change`` of the stream by each unit, the ``angular``
    distances, or the ``damage`` of dropping each unit alone (its parameter ``of`` names the kind).

    A criterion of width looks at a ``WidthTrace`` and gives a tensor for each sublayer, one figure an inner unit. It
    needs the ``weights`` alone, or what the write linears are given as well (``channels``), or ``slopes`` (its
    parameter ``answer`` names of what); one of experts needs what routers say (``routing``); others
    what each unit alone does (``knockouts``) or what ``adapters`` tell of weights. A figure may be infinite:
    that unit is unknown and nothing drops it. One of hidden channels (``stream``) looks at a ``StreamTrace`` and gives
    a tensor for each stack, one figure a channel."""

    name: str
    function: Function
    needs: Needs
    parameters: type[BaseModel]

    @property
    def wide(self) -> bool:
        """Whether it is a criterion of width."""
        return self.needs in WIDE

    @property
    def of_blocks(self) -> bool:
        """Whether it is a criterion of whole blocks alone."""
        return self.needs == "angular"

    def __call__(self, trace: Trace | WidthTrace, anatomy: Anatomy, **parameters: Any) -> dict[Address, Any]:
        """Importance of each unit that the calibration reached, high is important, in order of address."""
        scores = self.function(trace, anatomy, **self.check(parameters))
        return dict(sorted(scores.items()))

    def check(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """The parameters with defaults filled in. InputError if one is unknown or has an impossible value."""
        try:
            return dict(self.parameters(**parameters))
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                known = ", ".join(self.parameters.model_fields) or "none"
                raise InputError(f"score {self.name} has no parameter {name}; it has {known}") from error
            raise InputError(f"parameter {name} of score {self.name}: {first['msg']}") from error

    def statistics(self, **parameters: Any) -> frozenset[Statistic]:
        """What ``measure.trace`` must take for this score with these parameters; nothing for damage and for width."""
        chosen = self.check(parameters)
        if self.needs in ("damage", "stream") or self.wide:
            return frozenset()
        if self.needs == "angular":
            return frozenset({"angular"})
        return frozenset({"block" if chosen["unit"] == "block" else "sublayer"})


def score(name: str, needs: Needs) -> Callable[[Function], Function]:
    """Give a function ``(trace, anatomy, **parameters) -> {unit: importance}`` its name in recipes.

    Its parameters and their types are read from its signature.
    """

    def register(function: Function) -> Function:
        hints = get_type_hints(function, include_extras=True)
        fields = {
            parameter.name: (hints[parameter.name], ... if parameter.default is Parameter.empty else parameter.default)
            for parameter in list(signature(function).parameters.values())[2:]
        }
        model = create_model(f"{name} parameters", __config__=ConfigDict(extra="forbid"), **fields)  # type: ignore[call-overload]
        SCORES[name] = Score(name, function, needs, model)
        return function

    return register


def named(name: str) -> Score:
    """The score of that name. InputError with the list of names if there is none."""
    if name not in SCORES:
        raise InputError(f"there is no score {name!r}; there are {', '.join(sorted(SCORES))}")
    return SCORES[name]


def of_kind(figures: dict[Address, float], unit: Unit) -> dict[Address, float]:
    """The figures of units of one kind: blocks, all sublayers, or one kind of sublayer."""
    return {a: f for a, f in figures.items() if unit == (a.sublayer or "block") or (unit == "sublayer" and a.sublayer)}
