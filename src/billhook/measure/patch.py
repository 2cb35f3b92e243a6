"""Looking into a live model and stepping around parts of it, for the length of one call.

A module is stepped around by an instance attribute ``forward`` that hides the method of its class: the module tree,
its attributes and its weights stay as they are, whatever the model's own forward asks of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from billhook.anatomy.stubs import STUBS
from billhook.anatomy.types import Sublayer

Forward = Callable[..., Any]
Tail = tuple[Any, ...] | None
"""What a block returns after the stream; None where it returns the bare stream."""


class Reached(Exception):
    """Raised from a hook to end a forward pass once everything of interest has been seen."""


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the training flag of every module is put back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def overridden(forwards: Iterable[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Let each module compute the given function instead; undone on leaving, also by an exception."""
    before: list[tuple[nn.Module, Forward | None]] = []
    try:
        for module, forward in forwards:
            before.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in reversed(before):
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Call ``hook(module, args, kwargs, output)`` after each module's forward; all hooks are gone on leaving."""
    handles = []
    try:
        for module, hook in hooks:
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def hooked_before(hooks: Iterable[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Call ``hook(module, args)`` before each module's forward, which gets what it returns; all hooks are gone on
    leaving."""
    handles = []
    try:
        for module, hook in hooks:
            handles.append(module.register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def silencers(model: nn.Module, sublayers: Iterable[Sublayer]) -> list[tuple[nn.Module, Forward]]:
    """The overrides under which the sublayers write nothing to the stream."""
    return [(model.get_submodule(cut.path), STUBS[cut.stub]().forward) for s in sublayers for cut in s.cuts]


stream_in: Callable[..., Tensor] = STUBS["identity"]().forward
"""The residual stream among the arguments of a block."""


def stream_out(output: Any) -> Tensor:
    """The residual stream in what a block returned: a tensor, or a tuple that begins with it."""
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


def tail_of(output: Any) -> Tail:
    """What a block returned after the stream."""
    return output[1:] if isinstance(output, tuple) else None


def hand_on(*args: Any, tail: Tail, **kwargs: Any) -> Any:
    """In the place of a block: the stream as it comes in."""
    stream = stream_in(*args, **kwargs)
    return stream if tail is None else (stream, *tail)


def put_in(*args: Any, stream: Tensor, tail: Tail, **kwargs: Any) -> Any:
    """In the place of a block: this stream."""
    return stream if tail is None else (stream, *tail)


def on_stream(*args: Any, own: Forward, stream: Tensor, **kwargs: Any) -> Any:
    """A block's ``own`` forward on another stream than the one that comes in."""
    if args:
        return own(stream, *args[1:], **kwargs)
    return own(**{**kwargs, "hidden_states": stream})


def lending(*args: Any, own: Forward, stream: Tensor, answer: Forward, **kwargs: Any) -> Any:
    """In the place of a block whose keys and values later ones read: it runs on ``stream`` for these alone, and hands
    out what ``answer`` does."""
    on_stream(*args, own=own, stream=stream, **kwargs)
    return answer(*args, **kwargs)
