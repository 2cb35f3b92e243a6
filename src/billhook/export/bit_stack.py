"""A model as a stack of small blocks in one file, of which any first part is a coarser model."""

from __future__ import annotations

import copy
import heapq
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from billhook.anatomy import Anatomy
from billhook.anatomy.low_rank import is_conv, matrix
from billhook.data import Windows
from billhook.measure.batches import Batch, batches_of
from billhook.measure.patch import hooked, observing
from billhook.models import building, check_out, copy_extras
from billhook.models.checks import read_config
from billhook.models.quiet import quiet
from billhook.plan.errors import InputError
from billhook.surgery.skips import declares_cuts

Progress = Callable[[str, int, int], None]
RANK = 16  # of the magnitude in a block: as in the authors' code
LEVELS = 8
_REST, _BLOCKS, _INDEX = "rest.safetensors", "blocks.bin", "stack.json"


@dataclass(frozen=True, eq=False)
class Block:
    """About one bit a parameter of a matrix [o, i]: ``signs`` bool [o, i], and their magnitude, ``left`` [o, k] of
    ``right`` [k, i], float16."""

    signs: Tensor
    left: Tensor
    right: Tensor

    def matrix(self) -> Tensor:
        magnitude = self.left.float() @ self.right.float()
        return torch.where(self.signs, magnitude, -magnitude)

    def dumps(self) -> bytes:
        bits = np.packbits(self.signs.cpu().numpy()).tobytes()
        return bits + b"".join(part.cpu().numpy().tobytes() for part in (self.left, self.right))


def loaded(content: bytes, outputs: int, inputs: int, rank: int) -> Block:
    """The block of a matrix [outputs, inputs] that ``dumps`` made."""
    length = -(-outputs * inputs // 8)
    bits = np.unpackbits(np.frombuffer(content[:length], np.uint8), count=outputs * inputs)
    values = torch.from_numpy(np.frombuffer(content[length:], np.float16).copy())
    left, right = values[: outputs * rank], values[outputs * rank :]
    signs = torch.from_numpy(bits.astype(bool)).reshape(outputs, inputs)
    return Block(signs, left.reshape(outputs, rank), right.reshape(rank, inputs))


def blocks_of(weight: Tensor, rank: int = RANK, levels: int = LEVELS) -> Iterator[tuple[Block, float]]:
    """Blocks that add up to a matrix [o, i] better and better, each with the squared error that it takes away.

    A block is the sign of what is left, times the matrix of a ``rank`` nearest to its absolute value; the next one is
    made of what is left then (Eckart-Young: what a block takes away is the energy of its magnitude).
    """
    left = weight.float()
    for _ in range(levels):
        size = left.abs()
        gram = size @ size.T if len(size) <= size.shape[1] else size.T @ size
        vectors = torch.linalg.eigh(gram.double())[1][:, -min(rank, len(gram)) :].float()
        if len(size) > size.shape[1]:
            vectors = torch.linalg.qr(size @ vectors)[0]
        block = Block(left >= 0, vectors.half(), (vectors.T @ size).half())
        after = left - block.matrix()
        yield block, (left.double().square().sum() - after.double().square().sum()).item()
        left = after


def stack(
    model: Any,
    anatomy: Anatomy,
    source: Windows | Iterable[Batch],
    out: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    levels: int = LEVELS,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a model into a folder from which ``unstack`` makes models of any size.

    Each linear that is a module of its own is decomposed ``levels`` times, its inputs weighed by the root of their mean
    square on the calibration ``source``, into blocks of about a bit a parameter. All blocks of all linears stand in one
    file, those first that take away most of the error of their linear's output for a byte. Everything else (embeddings,
    norms, fused experts) is stored as it is and always needed.

    Source: BitStack (arXiv 2410.23918): blocks and weighing. There the order is that of the perplexity measured with
    each linear at each level; here it is the share of the output's energy, from one pass. Cost: a pass, and for each
    block an eigenvalue decomposition of the smaller side. Raises InputError for a model that is cut already, and for
    values that are not finite.
    """
    check_out(out, overwrite)
    if levels < 1:
        raise InputError(f"{levels} levels leave nothing of a linear; give at least 1")
    if declares_cuts(model.config.to_dict()):
        raise InputError("a model that is cut in a form of its own cannot be stacked; stack an ordinary one")
    paths = [
        f"{anatomy.block(address.parent).path}.{path}"
        for address, sublayer in anatomy.outline.sublayers()
        for path in sublayer.linears
    ]
    if not paths:
        raise InputError(f"no linear of this {anatomy.family} model is a module of its own; nothing can be stacked")
    scales = _scales(model, paths, source)
    found: dict[str, list[tuple[float, bytes]]] = {}
    for number, path in enumerate(paths):
        weight = matrix(model.get_submodule(path)).float() * scales[path]
        energy = weight.double().square().sum().item()
        if not np.isfinite(energy):
            raise InputError(f"{path} or what it is given holds NaN or infinite values: they are damaged")
        found[path] = [(gain / max(energy, 1e-30), b.dumps()) for b, gain in blocks_of(weight, levels=levels)]
        if progress is not None:
            progress("stacking", number + 1, len(paths))
    tied = set(model.all_tied_weights_keys)
    stacked = {f"{path}.weight" for path in paths}
    rest = {name: t.contiguous() for name, t in model.state_dict().items() if name not in stacked | tied}
    rest |= {f"scale of {path}": scale.to(torch.float16).contiguous() for path, scale in scales.items()}
    shapes = {path: list(matrix(model.get_submodule(path)).shape) for path in paths}
    turned = [path for path in paths if is_conv(model.get_submodule(path))]
    with building(out, overwrite) as place:
        folder = Path(place)
        with quiet():
            config = copy.deepcopy(model.config)
            config.architectures, config.dtype = [type(model).__name__], model.dtype
            config.save_pretrained(folder)
            if getattr(model, "generation_config", None) is not None:
                model.generation_config.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        save_file(rest, folder / _REST)
        order = []
        with (folder / _BLOCKS).open("wb") as file:
            for path, content in _ranked(found):
                file.write(content)
                order.append([paths.index(path), len(content)])
        index = {"rank": RANK, "linears": paths, "shapes": shapes, "transposed": turned, "blocks": order}
        index["dtype"] = str(model.dtype).removeprefix("torch.")
        (folder / _INDEX).write_text(json.dumps(index) + "\n", encoding="utf-8")
    return Path(out)


def unstack(source: str | os.PathLike[str], out: str | os.PathLike[str], *, size: int, overwrite: bool = False) -> int:
    """Make an ordinary checkpoint of as much of a stack as fits into ``size`` bytes, and return how many were read.

    Its first blocks and everything else count: what has to be kept or sent. The checkpoint itself has weights as wide
    as the stacked model had, whatever ``size``. A file of blocks that was cut off does too. Raises InputError where not
    even everything else fits, or a folder holds no stack.
    """
    check_out(out, overwrite, source)
    folder = Path(source)
    with _stacked(folder):
        tensors, read = _summed(folder, size)
    read_config(folder)
    with building(out, overwrite) as place:
        copy_extras(folder, Path(place))
        (Path(place) / "config.json").write_bytes((folder / "config.json").read_bytes())
        (Path(place) / _INDEX).unlink(missing_ok=True)
        save_file(tensors, Path(place) / "model.safetensors", metadata={"format": "pt"})
    return read


def sizes(source: str | os.PathLike[str]) -> tuple[int, int]:
    """Bytes of a stack: those that are always needed, and all. InputError where a folder holds none."""
    with _stacked(Path(source)):
        rest, blocks = ((Path(source) / name).stat().st_size for name in (_REST, _BLOCKS))
    return rest, rest + blocks


@contextmanager
def _stacked(folder: Path) -> Iterator[None]:
    """Whatever goes wrong in the reading of a stack is one line."""
    try:
        yield
    except InputError:
        raise
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{folder} holds no stack that Billhook wrote: {error}") from error


def _summed(folder: Path, size: int) -> tuple[dict[str, Tensor], int]:
    """The tensors of as much of a stack as fits into ``size`` bytes, and how many were read."""
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    paths, shapes, order, rank = (index[key] for key in ("linears", "shapes", "blocks", "rank"))
    turned, dtype = set(index["transposed"]), getattr(torch, index["dtype"])
    rest = load_file(folder / _REST)
    read = (folder / _REST).stat().st_size
    if size < read:
        raise InputError(f"{size:,} bytes are too few: what is not stacked takes {read:,} already")
    sums = {path: torch.zeros(shapes[path]) for path in paths}
    with (folder / _BLOCKS).open("rb") as file:
        for number, length in order:
            content = file.read(length) if read + length <= size else b""
            if len(content) < length:
                break
            path = paths[number]
            outputs, inputs = shapes[path]
            sums[path] += loaded(content, outputs, inputs, min(rank, outputs, inputs)).matrix()
            read += length
    tensors = {name: tensor for name, tensor in rest.items() if not name.startswith("scale of ")}
    for path, total in sums.items():
        weight = (total / rest[f"scale of {path}"].float()).to(dtype)
        tensors[f"{path}.weight"] = weight.T.contiguous() if path in turned else weight
    return tensors, read


def _ranked(found: dict[str, list[tuple[float, bytes]]]) -> Iterator[tuple[str, bytes]]:
    """Blocks of all linears, those of one in their order, always the one that gains most a byte; ties by path."""
    rows = {path: iter(blocks) for path, blocks in found.items()}
    waiting: list[tuple[float, str, bytes]] = []

    def wait(path: str) -> None:
        block = next(rows[path], None)
        if block is not None:
            heapq.heappush(waiting, (-block[0] / len(block[1]), path, block[1]))

    for path in rows:
        wait(path)
    while waiting:
        _, path, content = heapq.heappop(waiting)
        yield path, content
        wait(path)


def _scales(model: nn.Module, paths: list[str], source: Windows | Iterable[Batch]) -> dict[str, Tensor]:
    """The root of the mean square of each input of linears, relative to the mean over inputs, a thousandth at least; 1
    where nothing came by."""
    sums: dict[str, Tensor] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            squares = args[0].detach().double().square().flatten(0, -2).sum(0)
            sums[path] = sums[path] + squares if path in sums else squares

        return hook

    with observing(model), hooked([(model.get_submodule(path), watch(path)) for path in paths]):
        for batch in batches_of(source, model):
            model(**batch)
    scales = {}
    for path in paths:
        inputs = matrix(model.get_submodule(path)).shape[1]
        root = sums.get(path, torch.ones(inputs, dtype=torch.float64)).sqrt()
        scales[path] = (root / root.mean().clamp(min=1e-30)).clamp(min=1e-3).half().float().cpu()
    return scales
