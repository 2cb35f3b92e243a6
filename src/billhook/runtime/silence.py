"""Leaving out the work of a sublayer for one call, on a model whose module tree stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from billhook.anatomy.low_rank import is_conv
from billhook.anatomy.stubs import STUBS
from billhook.anatomy.types import Sublayer
from billhook.anatomy.undo import Undo
from billhook.anatomy.vocabulary import KEYS_VALUES, QUERIES

Forward = Callable[..., Any]

stream_in: Callable[..., Tensor] = STUBS["identity"]().forward
"""The residual stream among the arguments of a block."""


def stream_out(output: Any) -> Tensor:
    """The residual stream in what a block returned: a tensor, or a tuple that begins with it."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def with_stream(output: Any, stream: Tensor) -> Any:
    """What a block returned, with another stream in it."""
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


class Detour:
    """Another function in the place of a module's forward, on and off at will. An own forward that the module had
    before (a library that moves weights between devices gives it one) comes back."""

    def __init__(self, module: nn.Module, forward: Forward) -> None:
        self._attributes, self._forward, self._own = vars(module), forward, vars(module).get("forward")

    def on(self) -> None:
        self._attributes["forward"] = self._forward

    def off(self) -> None:
        if self._own is None:
            self._attributes.pop("forward", None)
        else:
            self._attributes["forward"] = self._own


def place(module: nn.Module, forward: Forward, undo: Undo) -> None:
    """Let the module compute something else until ``undo`` is restored."""
    detour = Detour(module, forward)
    detour.on()
    undo.then(detour.off)


class Gate:
    """One sublayer of a live model that can be left out for a call.

    ``shut()`` until ``open()``: its modules compute what their stubs would, so the stream after it is the stream before
    it. With ``keep_kv`` the attention module still runs, on the stream as it is, so that its keys and values reach the
    cache; the query and the output projection are left out where they are linears of their own, what it writes is
    thrown away, and the mixing itself is computed for nothing.
    """

    def __init__(self, model: nn.Module, sublayer: Sublayer, *, keep_kv: bool) -> None:
        self.sublayer, self.keep_kv = sublayer, keep_kv
        stubs = {cut.path: STUBS[cut.stub]().forward for cut in sublayer.cuts}
        if keep_kv:
            module = model.get_submodule(sublayer.module)
            stubs[sublayer.module] = _for_its_cache(module, stubs[sublayer.module], _idle(model, sublayer))
            stubs = {path: stub for path, stub in stubs.items() if path in (sublayer.module, sublayer.output)}
        self._detours = [Detour(model.get_submodule(path), stub) for path, stub in stubs.items()]

    def shut(self) -> None:
        for detour in self._detours:
            detour.on()

    def open(self) -> None:
        for detour in self._detours:
            detour.off()


def _for_its_cache(module: nn.Module, stub: Forward, idle: list[Detour]) -> Forward:
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        for detour in idle:
            detour.on()
        try:
            output = original(*args, **kwargs)
        finally:
            for detour in idle:
                detour.off()
        silent = stub(*args, **kwargs)
        # a position bias that later blocks read comes from the module, not from its stub
        return (silent[0], *output[1:]) if len(output) > 2 else silent

    return forward


def idle_params(model: nn.Module, sublayer: Sublayer) -> int:
    """Weights that a token does not multiply with where an attention only makes its keys and values."""
    return sum(model.get_parameter(name).numel() for name in _idle_names(sublayer))


def key_value_params(model: nn.Module, sublayer: Sublayer) -> int:
    """Weights that a token does not multiply with where an attention reads another's keys and values."""
    return sum(model.get_parameter(name).numel() for name in _named(sublayer, KEYS_VALUES))


def without_keys_and_values(model: nn.Module, sublayer: Sublayer) -> Iterator[tuple[nn.Module, Forward]]:
    """The linears of an attention that make nothing but keys or values, and for each a forward that gives zeros."""
    return (_zeros(model, name) for name in _named(sublayer, KEYS_VALUES))


def _idle_names(sublayer: Sublayer) -> list[str]:
    return [*_named(sublayer, QUERIES), *sublayer.writes]


def _named(sublayer: Sublayer, leaves: frozenset[str]) -> list[str]:
    return [name for name in sublayer.reads if name.removesuffix(".weight").rpartition(".")[2] in leaves]


def _idle(model: nn.Module, sublayer: Sublayer) -> list[Detour]:
    """The linears of an attention whose output does not reach the cache."""
    return [Detour(*_zeros(model, name)) for name in _idle_names(sublayer)]


def width_of(linear: nn.Module) -> int:
    """How many values a linear puts out."""
    return linear.get_parameter("weight").shape[1 if is_conv(linear) else 0]


def _zeros(model: nn.Module, name: str) -> tuple[nn.Module, Forward]:
    linear = model.get_submodule(name.rpartition(".")[0])
    width = width_of(linear)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x.new_zeros(*x.shape[:-1], width)

    return linear, forward


class Masked:
    """One sublayer that is computed and then thrown away for some tokens."""

    def __init__(self, model: nn.Module, sublayer: Sublayer) -> None:
        module = model.get_submodule(sublayer.output)
        original, stub = module.forward, next((c.stub for c in sublayer.cuts if c.path == sublayer.output), "zero")
        residual = STUBS[stub]().forward if sublayer.adds_residual else None
        self._where: Tensor | None = None

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            written, where = stream_out(output), self._where
            assert where is not None
            nothing = stream_out(residual(*args, **kwargs)) if residual else torch.zeros_like(written)
            where = where.reshape(*written.shape[:-1], 1)  # some families flatten rows and tokens before their MLP
            return with_stream(output, torch.where(where, nothing, written))

        self._detour = Detour(module, forward)

    def to(self, where: Tensor | None) -> Self:
        self._where = where
        return self

    def shut(self) -> None:
        self._detour.on()

    def open(self) -> None:
        self._detour.off()
