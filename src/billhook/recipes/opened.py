"""The first steps of every walk: a loaded model, its anatomy, and how long each step took."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from billhook.anatomy import Anatomy, discover
from billhook.anatomy.bridge import require_no_bridges
from billhook.data import check_tokenizer
from billhook.evaluate.causal import positions
from billhook.models import Loaded, dtype_of, emulated, locate
from billhook.models.adapter import require_none
from billhook.plan.errors import InputError
from billhook.runtime.clock import now
from billhook.surgery.reopen import load


@dataclass(frozen=True)
class Opened:
    """A model ready to work on. ``stored`` is the dtype that results are saved in: that of the checkpoint, or the one
    asked for. The live model may be in float32 instead (see ``opened``)."""

    loaded: Loaded
    anatomy: Anatomy
    stored: torch.dtype

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer. Raises InputError where the model has none or one that does not fit it."""
        if self.loaded.tokenizer is None:
            raise InputError(f"model {self.loaded.source} comes without a tokenizer; text cannot be read for it")
        if self.anatomy.embedding is not None:
            check_tokenizer(self.loaded.tokenizer, self.model.get_input_embeddings().num_embeddings)
        return self.loaded.tokenizer

    def length(self, wanted: int) -> int:
        """A window length that the model's positions allow."""
        return min(wanted, positions(self.model) or wanted)


def opened(
    source: str | os.PathLike[str],
    *,
    dtype: str | None,
    device: str,
    trust_remote_code: bool,
    like: Opened | None = None,
    beside: bool = False,
) -> Opened:
    """Load a model, what Billhook saved included, and find its parts.

    Without a ``dtype`` it is that of the checkpoint, computed in float32 where the processor would only emulate it:
    the same weights, several times as fast. ``like`` another model: in the dtypes of that one.
    One with paths of low rank ``beside`` its linears, or bridges behind its blocks, can be run; what cuts models or
    runs them otherwise refuses it.
    """
    wanted = like.stored if like else dtype
    if not beside:
        require_none(locate(source, trust_remote_code))
    loaded = load(source, dtype=wanted, device=device, trust_remote_code=trust_remote_code)
    found = Opened(loaded, discover(loaded.model), dtype_of(loaded.model))
    if not beside:
        require_no_bridges(loaded.model, str(source))
    if (dtype_of(like.model) != like.stored) if like else (dtype is None and emulated(loaded.model)):
        loaded.model.float()
    return found


class Stopwatch:
    """Seconds for each named step of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        begun = now()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + now() - begun, 2)


def versions() -> dict[str, str]:
    """Of what a figure depends on: this package and those that compute it."""
    return {name: version(name) for name in ("billhook", "torch", "transformers")}


def left_behind(left_out: tuple[str, ...]) -> dict[str, str]:
    """The weights of the source that the model has no place for, as the record says it; empty for none."""
    return {"weights left out": ", ".join(left_out)} if left_out else {}


def environment(opened: Opened) -> dict[str, str]:
    """What the figures of a run depend on besides the plan, and which weights of the source the model has no place
    for."""
    model = opened.model
    return {
        **versions(),
        "python": platform.python_version(),
        "device": str(model.device),
        "dtype": _dtypes(dtype_of(model), opened.stored),
        **left_behind(opened.loaded.left_out),
    }


def _dtypes(computed: torch.dtype, stored: torch.dtype) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in (computed, stored)]
    return names[0] if computed == stored else f"{names[0]}, stored as {names[1]}"
