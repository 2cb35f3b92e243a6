"""What a policy is: a name, parameters, and a way onto a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from billhook.anatomy import Anatomy, discover
from billhook.data import Windows
from billhook.plan.errors import InputError
from billhook.runtime.attached import Attached

Dial = tuple[str, float, float]


class Policy(BaseModel, ABC):
    """Parameters of one way to run a model. Frozen data: what it learns from a stream while it runs is kept by what
    ``attach`` returns, and forgotten with it.

    ``name`` is its name on the command line and in files; ``kv`` its rule for keys and values of what is left out;
    ``paper`` its source. ``dial`` is the parameter that ``tune-policy`` turns, with the value at which nothing is left
    out and the one at which all is that may be; None where there is none; ``spares`` is what it turns for: the work of
    a token, or its cache. ``wants_text``: ``fitted`` must look at text
    first, at ``appetite`` times as much as is usual.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    paper: ClassVar[str]
    kv: ClassVar[str]
    dial: ClassVar[Dial | None] = None
    spares: ClassVar[Literal["flops", "kv_bytes"]] = "flops"
    wants_text: ClassVar[bool] = False
    appetite: ClassVar[int] = 1

    def attach(self, model: PreTrainedModel, anatomy: Anatomy | None = None) -> Attached:
        """Put the policy on the model: whatever calls the model or its ``generate`` from now on runs under it.

        ``anatomy`` saves finding it again. InputError where the model has no place for the policy, or has one already.
        """
        return self._attach(model, discover(model) if anatomy is None else anatomy)

    @property
    def dials(self) -> tuple[Dial, ...]:
        """All that ``tune-policy`` turns: the ``dial``, unless these parameters ask for two at once."""
        return () if self.dial is None else (self.dial,)

    @abstractmethod
    def _attach(self, model: PreTrainedModel, anatomy: Anatomy) -> Attached: ...

    def fitted(self, model: PreTrainedModel, anatomy: Anatomy, windows: Windows) -> Self:
        """The same policy with what it wants to know from text filled in."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """What was fitted and is too large for parameters, by name, for a file beside the policy's."""
        return {}

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        """The same policy with what such a file holds."""
        raise InputError(f"policy {self.name} has no tensors of its own")

    def __eq__(self, other: object) -> bool:
        """The same parameters, and the same tensors bit for bit."""
        if not isinstance(other, type(self)) or self.model_dump() != other.model_dump():
            return False
        mine, others = self.tensors(), other.tensors()
        return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)

    def turned(self, *values: float) -> Self:
        """The same policy with its dials at ``values``."""
        names = (name for name, _, _ in self.dials)
        return type(self).of({**self.model_dump(), **dict(zip(names, values, strict=True))})

    @classmethod
    def of(cls, parameters: dict[str, Any]) -> Self:
        """From parameters, which may be texts. InputError for an unknown one or an impossible value."""
        try:
            return cls(**parameters)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                known = ", ".join(cls.model_fields) or "none"
                raise InputError(f"policy {cls.name} has no parameter {place}; it has {known}") from error
            reason = first["msg"].removeprefix("Value error, ")
            raise InputError(f"policy {cls.name}: {f'parameter {place}: ' if place else ''}{reason}") from error
