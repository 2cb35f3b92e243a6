"""The dtype a model is computed in, and the one it is stored in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_HALVES = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def dtype_of(model: Any) -> torch.dtype:
    """The dtype of a model's parameters; of a mixed one that of the first."""
    first: torch.Tensor = next(model.parameters())
    return first.dtype


def native(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of a half precision itself."""
    known: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return known and bool(getattr(torch.ops.mkldnn, _HALVES[dtype])())


def emulated(model: Any) -> bool:
    """Whether this processor has no instructions for the half precision that all parameters of ``model`` are in, so
    that float32 is several times as fast (nine times for bfloat16 with AVX2 alone)."""
    kinds = {(parameter.dtype, parameter.device.type) for parameter in model.parameters()}
    if len(kinds) != 1:
        return False
    dtype, device = kinds.pop()
    return device == "cpu" and dtype in _HALVES and not native(dtype)


@contextmanager
def stored_as(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Inside the context a ``model`` that is in another dtype is in this one; leaving it puts the same values back.
    Tied weights stay tied. Costs a copy of the model in ``dtype``."""
    values = {parameter: parameter.data for parameter in model.parameters()} if dtype_of(model) != dtype else {}
    try:
        for parameter, value in values.items():
            parameter.data = value.to(dtype)
        yield
    finally:
        for parameter, value in values.items():
            parameter.data = value
