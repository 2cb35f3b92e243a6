"""Safetensors files as byte ranges: read their headers, write new files by copying ranges.

The format (safetensors README): 8 bytes little-endian header length, a JSON header of that length (name -> dtype,
shape, [begin, end) into the data; ``__metadata__``), then the data without gaps.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from billhook.plan.errors import InputError

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK = 8 * 2**20  # bytes in memory at any time
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: bytes ``begin`` to ``end`` of ``file``. ``dtype`` as the format spells it (BF16, F32)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin


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
    """Write tensors under new names by copying their bytes. Holds one chunk in memory, whatever the tensors' sizes.

    Raises InputError naming the first tensor that holds NaN or Inf.
    """
    tensors = list(tensors)
    header: dict[str, object] = {_METADATA: metadata} if metadata else {}
    at = 0
    for name, stored in tensors:
        header[name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [at, at + stored.size]}
        at += stored.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for _, stored in tensors:
            _copy(stored, out)


def _copy(stored: Stored, out: BinaryIO) -> None:
    dtype = _FLOATS.get(stored.dtype)
    with stored.file.open("rb") as source:
        source.seek(stored.begin)
        left = stored.size
        while left:
            chunk = bytearray(min(left, _CHUNK))
            if source.readinto(chunk) != len(chunk):
                raise OSError(f"{stored.file} ended {left} bytes early")
            if dtype is not None and not torch.frombuffer(chunk, dtype=dtype).isfinite().all():
                raise InputError(f"{stored.file}: weight {stored.name} holds NaN or Inf; the checkpoint is damaged")
            out.write(chunk)
            left -= len(chunk)
