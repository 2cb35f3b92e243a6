"""The plan: what to do to a model, as data."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from billhook.plan.address import Address
from billhook.plan.arrays import Arrays, ArraysField
from billhook.plan.errors import InputError
from billhook.plan.ranges import parse_ranges, write_ranges
from billhook.plan.schedule import Schedule
from billhook.plan.target import Target


def _address(value: object) -> Address:
    if isinstance(value, Address):
        return value
    if isinstance(value, str):
        return Address.parse(value)
    raise InputError(f"an address is a text such as decoder.12, not {value!r}")


AddressField = Annotated[
    Address,
    BeforeValidator(_address),
    PlainSerializer(str, return_type=str),
]


SCHEMA_VERSION: Final = 1
_KINDS = ("drop", "keep", "sparsify", "factorise", "channels")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Drop(_Record):
    """Remove a block, or one sublayer of it: its contribution to the residual stream becomes zero."""

    kind: Literal["drop"] = "drop"
    unit: AddressField


IndicesField = Annotated[
    tuple[int, ...],
    BeforeValidator(parse_ranges),
    PlainSerializer(write_ranges, return_type=str),
]


class Keep(_Record):
    """Keep these inner units of a sublayer and remove the others of their kind, with everything coupled to them.

    ``indices`` count in the original model, in rising order. In JSON they are ranges in one string, ``0-511,514``:
    short where units were kept in runs, a few bytes a unit otherwise, and still readable and diffable in the plan.
    """

    kind: Literal["keep"] = "keep"
    unit: AddressField
    inner: Literal["neuron", "group", "expert"]
    indices: IndicesField


class Sparsify(_Record):
    """Set single weights of a sublayer to zero. ``zeros``: how many of each linear, by the name of its weight inside
    the block. Which ones is in the plan's arrays, ``array(linear)``: bits in the shape of the weight in the original
    model, 1 for those that stay, eight to a byte along the last axis.

    ``pattern``: ``N:M`` where at most N of M inputs in a row have a weight in each output, or ``unstructured``.
    """

    kind: Literal["sparsify"] = "sparsify"
    unit: AddressField
    pattern: str = "unstructured"
    zeros: dict[str, Annotated[int, Field(ge=1)]]

    def array(self, linear: str) -> str:
        return f"{self.unit}/{linear}"


class Factorise(_Record):
    """Replace a linear W of a sublayer by two, ``rank`` wide in between: W becomes U U'W.

    ``linear`` is its path within the block (``mlp.up_proj``). The basis U [outputs, rank], with orthonormal columns, is
    the array ``array`` of the plan, in float32; U'W follows from the weights as they are.

    Of a mixture's experts (``mlp.experts``) each keeps its first ``rank`` neurons whole, and the linears of its others
    become two; there is no array, the bases follow from the weights too.
    """

    kind: Literal["factorise"] = "factorise"
    unit: AddressField
    linear: Annotated[str, Field(pattern=r"^\w+(\.\w+)*$")]
    rank: Annotated[int, Field(ge=1)]

    @property
    def array(self) -> str:
        return f"{self.unit}/{self.linear}/basis"


class HiddenChannels(_Record):
    """Keep these channels of a stack's residual stream and remove the others from everything that reads or writes it:
    the model has a smaller hidden size. ``indices`` count in the original model, in rising order; see ``Keep``."""

    kind: Literal["channels"] = "channels"
    stack: Annotated[str, Field(pattern=r"^[a-z][a-z_]*$")]
    indices: IndicesField


def _edit_kind(value: object) -> object:
    """Edits of the first plans may lack ``kind``: they are drops."""
    return {"kind": "drop", **value} if isinstance(value, dict) else value


Edit = Annotated[
    Annotated[Drop | Keep | Sparsify | Factorise | HiddenChannels, Field(discriminator="kind")],
    BeforeValidator(_edit_kind),
]


class Provenance(_Record):
    """Where a plan came from. ``model`` and ``calibration`` are fingerprints; empty where written by hand."""

    model: str = ""
    calibration: str = ""
    recipe: str = ""
    seed: int | None = None
    versions: dict[str, str] = {}


class Plan(_Record):
    """A declarative, diffable list of edits, and what to leave out or loop while the model runs. The empty plan changes
    nothing."""

    schema_version: Literal[1] = 1
    target: Target = Target.ANY
    budget: str | None = None
    edits: tuple[Edit, ...] = ()
    schedule: Schedule | None = Field(default=None, exclude_if=lambda schedule: schedule is None)
    arrays: ArraysField = Field(default_factory=Arrays, exclude_if=lambda arrays: not arrays)
    provenance: Provenance = Field(default_factory=Provenance)

    @classmethod
    def of(
        cls,
        units: Iterable[Address | str],
        target: Target = Target.ANY,
        keeps: Iterable[Keep] = (),
        sparsities: Iterable[Sparsify] = (),
        arrays: Arrays | None = None,
        channels: Iterable[HiddenChannels] = (),
    ) -> Self:
        """A plan that drops the given units, narrows others by ``keeps``, makes some sparse and streams narrower by
        ``channels``, in order of address, drops first. ``arrays`` are those that its edits name."""
        addresses = {Address.parse(u) if isinstance(u, str) else u for u in units}
        drops = tuple(Drop(unit=a) for a in sorted(addresses))
        narrow = sorted(keeps, key=lambda keep: (keep.unit, keep.inner))
        sparse = sorted(sparsities, key=lambda edit: edit.unit)
        thin = sorted(channels, key=lambda edit: edit.stack)
        return cls(target=target, edits=(*drops, *narrow, *sparse, *thin), arrays=arrays or Arrays())

    @property
    def drops(self) -> frozenset[Address]:
        """The blocks and sublayers that go."""
        return frozenset(edit.unit for edit in self.edits if isinstance(edit, Drop))

    @property
    def keeps(self) -> tuple[Keep, ...]:
        """The sublayers that get narrower."""
        return tuple(edit for edit in self.edits if isinstance(edit, Keep))

    @property
    def sparsities(self) -> tuple[Sparsify, ...]:
        """The sublayers that lose single weights."""
        return tuple(edit for edit in self.edits if isinstance(edit, Sparsify))

    @property
    def channels(self) -> tuple[HiddenChannels, ...]:
        """The residual streams that get narrower."""
        return tuple(edit for edit in self.edits if isinstance(edit, HiddenChannels))

    def factorised(self, bases: Mapping[Factorise, NDArray[Any]]) -> Self:
        """The same plan with these linears in two as well, each by its basis."""
        edits = sorted(bases, key=lambda edit: (edit.unit, edit.linear))
        arrays = Arrays({**self.arrays, **{edit.array: basis for edit, basis in bases.items()}})
        return self.model_copy(update={"edits": (*self.edits, *edits), "arrays": arrays})

    @property
    def factors(self) -> tuple[Factorise, ...]:
        """The linears that become two."""
        return tuple(edit for edit in self.edits if isinstance(edit, Factorise))

    @property
    def empty(self) -> bool:
        """Whether nothing becomes of it."""
        return not self.edits and self.schedule is None

    def dumps(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a plan file, and its arrays, where it has any, beside it."""
        path = Path(path)
        self.arrays.write(path)
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        fresh.write_text(self.dumps(), encoding="utf-8")
        fresh.replace(path)

    @classmethod
    def loads(cls, text: str, name: str = "plan") -> Self:
        """Parse a plan; raises InputError with the first thing that is wrong."""
        return cls._of_content(_parse(text, name), name)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read a plan file, or the plan inside a ``billhook.json``, with the arrays that lie beside it."""
        path = Path(path)
        if path.is_dir():
            path = path / "billhook.json"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"plan file {path} cannot be read: {error}") from error
        content = _parse(text, str(path))
        if isinstance(content, dict) and "plan" in content:
            content = content["plan"]
        return cls._of_content(content, str(path)).beside(path)

    def beside(self, path: Path) -> Self:
        """The same plan with the arrays that lie beside the file it came from. InputError where they do not."""
        return self.model_copy(update={"arrays": self.arrays.read(path)})

    @classmethod
    def _of_content(cls, content: object, name: str) -> Self:
        version = content.get("schema_version", SCHEMA_VERSION) if isinstance(content, dict) else SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            raise InputError(f"{name} has schema_version {version!r}; this version of Billhook reads {SCHEMA_VERSION}")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"] if part not in _KINDS) or "the top level"
            reason = first["msg"].removeprefix("Value error, ")
            raise InputError(f"{name} is not a valid plan: {place}: {reason}") from error


def _parse(text: str, name: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers too long and nesting too deep for the parser
        raise InputError(f"{name} is not JSON: {error}") from error
