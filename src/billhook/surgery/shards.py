"""Safetensors files as byte ranges: read their headers, write new files by copying ranges.

The format (safetensors README): 8 bytes little-endian header length, a JSON header of that length (name -> dtype,
shape, [begin, end) into the data; ``__metadata__``), then the data without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from billhook.plan.errors import InputError
from billhook.plan.masks import Packed, unpack
from billhook.plan.ranges import runs

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK = 8 * 2**20  # bytes in memory at any time
_METADATA = "__metadata__"


@dataclass(frozen=True, eq=False)
class Made:
    """What is written in the place of a tensor: of this shape, in the same type, made of all of its values."""

    shape: tuple[int, ...]
    of: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: bytes ``begin`` to ``end`` of ``file``. ``dtype`` as the format spells it (BF16, F32). Of a
    tensor to be narrowed only the entries ``kept`` along some axes (axis, entries) are written, zeros for what its
    ``mask`` takes, ``each`` entry changed if it says so; of others what is ``made`` of them."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    kept: tuple[tuple[int, tuple[int, ...]], ...] = ()
    mask: Packed | None = field(default=None, compare=False)
    made: Made | None = field(default=None, compare=False)
    each: Callable[[Tensor], Tensor] | None = field(default=None, compare=False)

    @property
    def written(self) -> tuple[int, ...]:
        """The shape that is written."""
        if self.made is not None:
            return self.made.shape
        shape = list(self.shape)
        for axis, entries in self.kept:
            shape[axis] = len(entries)
        return tuple(shape)

    @property
    def size(self) -> int:
        """The bytes that are written."""
        return (self.end - self.begin) * math.prod(self.written) // max(math.prod(self.shape), 1)


Headers = dict[Path, tuple[dict[str, Stored], dict[str, str]]]


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a file, in the order in which they lie, and its metadata. The file must have been checked
    (``models.checks.weight_files``)."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    metadata = header.pop(_METADATA, {})
    start = 8 + length
    tensors = {
        name: Stored(name, path, entry["dtype"], tuple(entry["shape"]), *(start + at for at in entry["data_offsets"]))
        for name, entry in header.items()
    }
    return dict(sorted(tensors.items(), key=lambda item: item[1].begin)), metadata


def write_shard(path: Path, tensors: Iterable[tuple[str, Stored]], metadata: dict[str, str]) -> None:
    """Write tensors, or what is kept of them, under new names. Holds one chunk in memory, whatever the tensors' sizes.

    Raises InputError naming the first tensor that holds NaN or Inf.
    """
    tensors = list(tensors)
    header: dict[str, object] = {_METADATA: metadata} if metadata else {}
    at = 0
    for name, stored in tensors:
        header[name] = {"dtype": stored.dtype, "shape": stored.written, "data_offsets": [at, at + stored.size]}
        at += stored.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for _, stored in tensors:
            _copy(stored, out)


def _copy(stored: Stored, out: BinaryIO) -> None:
    """Copy a tensor, or what is kept of it, a chunk at a time: of the first axis byte ranges, of any other all that one
    entry of the first kept axis has (an entry of the axes before it), of which the kept entries are picked."""
    whole = stored.end - stored.begin
    gone = None if stored.mask is None else ~unpack(stored.mask, stored.shape).reshape(-1)
    kept = dict(stored.kept)
    first = kept.pop(0, None)
    with stored.file.open("rb") as source:
        if stored.made is not None:
            data = bytearray().join(_chunks(stored, source, 0, whole, _CHUNK, gone))
            new = stored.made.of(torch.frombuffer(data, dtype=FLOATS[stored.dtype]).view(stored.shape))
            out.write(new.contiguous().view(torch.uint8).numpy().tobytes())
            return
        ahead = 1 if first is not None else min(kept, default=0)  # axes of which whole entries are read
        row = whole // max(math.prod(stored.shape[:ahead]), 1) if kept else 1
        entry = whole // stored.shape[0] if first is not None else whole
        for begin, last in [(0, 0)] if first is None else runs(first):
            for chunk in _chunks(stored, source, begin * entry, (last + 1) * entry, max(_CHUNK // row, 1) * row, gone):
                out.write(_changed(stored, _picked(stored, chunk, row, ahead, kept) if kept else chunk))


def _picked(stored: Stored, chunk: bytearray, row: int, ahead: int, kept: dict[int, tuple[int, ...]]) -> bytearray:
    """What is kept of rows of bytes, each an entry of the ``ahead`` first axes."""
    rows = torch.frombuffer(chunk, dtype=torch.uint8).view(len(chunk) // row, *stored.shape[ahead:], -1)
    for axis, entries in kept.items():
        rows = rows.index_select(axis - ahead + 1, torch.tensor(entries))
    return bytearray(rows.numpy().tobytes())


def _changed(stored: Stored, chunk: bytearray) -> bytes | bytearray:
    if stored.each is None:
        return chunk
    new = stored.each(torch.frombuffer(chunk, dtype=FLOATS[stored.dtype]))
    return new.contiguous().view(torch.uint8).numpy().tobytes()


def _chunks(
    stored: Stored, source: BufferedReader, begin: int, end: int, size: int, gone: NDArray[np.bool_] | None
) -> Iterator[bytearray]:
    dtype = FLOATS.get(stored.dtype)
    width = (stored.end - stored.begin) // max(math.prod(stored.shape), 1)
    source.seek(stored.begin + begin)
    left = end - begin
    while left:
        chunk = bytearray(min(left, size))
        if source.readinto(chunk) != len(chunk):
            raise OSError(f"{stored.file} ended {left} bytes early")
        if dtype is not None and not torch.frombuffer(chunk, dtype=dtype).isfinite().all():
            raise InputError(f"{stored.file}: weight {stored.name} holds NaN or Inf; the checkpoint is damaged")
        if gone is not None:
            first = (end - left) // width
            values = np.frombuffer(chunk, np.uint8).reshape(-1, width)
            values[gone[first : first + len(values)]] = 0
        yield chunk
        left -= len(chunk)
