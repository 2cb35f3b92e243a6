"""Large arrays that belong to a plan: its edits name them, a file beside the plan holds them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import PlainSerializer, PlainValidator
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from billhook.plan.errors import InputError

SUFFIX = ".arrays"


class Arrays(Mapping[str, NDArray[Any]]):
    """Name -> array, read-only. The plan itself holds only their ``digest``, so a plan and its file cannot be mixed up,
    and equal plans are equal bytes; two are equal where their digests are.

    The file is in the safetensors format but ends in ``.arrays``: engines take every ``*.safetensors`` in a folder for
    weights of the model. A digest without content comes of a plan that was parsed without its file; looking into it
    raises InputError.
    """

    def __init__(self, content: Mapping[str, NDArray[Any]] | None = None, digest: str = "") -> None:
        if content is None and not digest:
            content = {}
        self._content = None if content is None else MappingProxyType(dict(sorted(content.items())))
        self.digest = digest if self._content is None else _digest(self._content)

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._known():
            raise InputError(f"the plan names the array {name}, which is not in the file beside it")
        return self._known()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known())

    def __len__(self) -> int:
        return len(self._known())

    def __contains__(self, name: object) -> bool:
        return name in self._known()

    def __bool__(self) -> bool:
        return bool(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Arrays) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        return Arrays, (None if self._content is None else dict(self._content), self.digest)

    def __repr__(self) -> str:
        return f"Arrays({self.digest or 'none'})"

    def write(self, plan: Path) -> None:
        """Put them beside the plan file ``plan``, as NAME.arrays, in one step; no file where there are none."""
        if self:
            path = plan.with_suffix(SUFFIX)
            fresh = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                save_file({name: np.ascontiguousarray(array) for name, array in self._known().items()}, fresh)
                fresh.replace(path)
            finally:
                fresh.unlink(missing_ok=True)

    def read(self, plan: Path) -> Arrays:
        """Those that lie beside the plan file ``plan``. InputError where they are not there, or not these ones."""
        if not self:
            return self
        path = plan.with_suffix(SUFFIX)
        try:
            found = Arrays(load_file(path))
        except (OSError, SafetensorError) as error:
            raise InputError(f"the arrays of plan {plan} cannot be read from {path}: {error}") from error
        if found != self:
            raise InputError(f"{path} does not belong to plan {plan}: its arrays are other ones")
        return found

    def _known(self) -> Mapping[str, NDArray[Any]]:
        if self._content is None:
            raise InputError(f"the plan's arrays lie in a file beside it ({SUFFIX}), which has not been read")
        return self._content


def _digest(content: Mapping[str, NDArray[Any]]) -> str:
    """Of names, dtypes, shapes and values; empty for no arrays."""
    if not content:
        return ""
    digest = hashlib.sha256()
    for name, array in content.items():
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return f"sha256:{digest.hexdigest()}"


def _arrays(value: object) -> Arrays:
    if isinstance(value, Arrays):
        return value
    if isinstance(value, str) and value.startswith("sha256:"):
        return Arrays(digest=value)
    raise ValueError(f"arrays are named by their digest, sha256:..., not by {value!r}")


ArraysField = Annotated[Arrays, PlainValidator(_arrays), PlainSerializer(lambda arrays: arrays.digest, return_type=str)]
