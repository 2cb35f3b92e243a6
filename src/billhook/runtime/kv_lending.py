"""Attentions that read the keys and values of an earlier block in place of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from billhook.anatomy import Anatomy, Stack, Sublayer
from billhook.anatomy.undo import Undo
from billhook.anatomy.vocabulary import CACHES, ROTATES
from billhook.plan.errors import InputError
from billhook.runtime.silence import Forward, place

Entries = tuple[Tensor, Tensor]
STACK = "decoder"


def kinds(model: nn.Module, anatomy: Anatomy) -> dict[int, Hashable]:
    """Of each block of the decoder that makes keys and values, what they are like: one block can read another's where
    these are equal. Heads, their width, the window, and how positions are in the keys. InputError for a model that is
    no decoder language model."""
    stacks = {stack.name: stack for stack in anatomy.stacks}
    if STACK not in stacks or not stacks[STACK].causal or "encoder" in stacks:
        raise InputError(
            f"keys and values are shared between the blocks of a decoder language model; this is a {anatomy.family} "
            f"model"
        )
    found: dict[int, Hashable] = {}
    for block in stacks[STACK].blocks:
        sublayers = anatomy.outline.stack(STACK).blocks[block.address.block].sublayers
        attention = attention_of(block.sublayers)
        if attention is None or not sublayers["attention"].cache_width:
            continue
        size = sublayers["attention"]
        rotates = getattr(model.get_submodule(attention.module), ROTATES, True)
        found[block.address.block] = (size.kv_heads, size.head_dim, size.cache_width, size.window, rotates)
    return found


def attention_of(sublayers: Sequence[Sublayer]) -> Sublayer | None:
    """The attention of a block, if it still has one."""
    return next((sub for sub in sublayers if sub.kind == "attention"), None)


def nearest(kinds: Mapping[int, Hashable], borrowing: set[int]) -> dict[int, int]:
    """For each borrowing block the nearest one before it that keeps its own keys and values, of the same kind; those
    that have none before them keep their own."""
    last: dict[Hashable, int] = {}
    lenders: dict[int, int] = {}
    for number, kind in sorted(kinds.items()):
        if number in borrowing and kind in last:
            lenders[number] = last[kind]
        else:
            last[kind] = number
    return lenders


def lend(model: nn.Module, stack: Stack, lenders: Mapping[int, int], undo: Undo) -> None:
    """Let the attention of each block of ``lenders`` read the keys and values of the block that it names, until
    ``undo`` is restored: the very tensors that the lender attends to in this pass, rotated and cached. What it would
    have made itself is not put into the cache. Works with and without a cache, and lets gradients through.
    """
    passing: dict[int, Entries] = {}
    owner = model.get_submodule(stack.path.rpartition(".")[0])
    place(owner, _forgetting(owner.forward, passing), undo)
    for number in sorted({*lenders, *lenders.values()}):
        attention = attention_of(stack.blocks[number].sublayers)
        assert attention is not None
        module = model.get_submodule(attention.module)
        place(module, _looking(module.forward, _answer(passing, number, lenders.get(number))), undo)


def _answer(passing: dict[int, Entries], number: int, lender: int | None) -> Callable[..., Entries]:
    def keeps(cache: Any, keys: Tensor, values: Tensor, *rest: Any, **more: Any) -> Entries:
        found = (keys, values) if cache is None else cache.update(keys, values, *rest, **more)
        passing[number] = found
        return found

    def borrows(*_: Any, **__: Any) -> Entries:
        assert lender is not None
        return passing[lender]

    return keeps if lender is None else borrows


class _View:
    """What an attention gets for the cache, also where there is none."""

    def __init__(self, cache: Any, answer: Callable[..., Entries]) -> None:
        self._cache, self._answer = cache, answer

    def update(self, *args: Any, **kwargs: Any) -> Entries:
        return self._answer(self._cache, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _looking(original: Forward, answer: Callable[..., Entries]) -> Forward:
    """An attention's forward with a view in the place of its cache."""
    names = list(inspect.signature(original).parameters)
    name = next(name for name in CACHES if name in names)
    at = names.index(name)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if len(args) > at:
            return original(*args[:at], _View(args[at], answer), *args[at + 1 :], **kwargs)
        return original(*args, **{**kwargs, name: _View(kwargs.get(name), answer)})

    return forward


def _forgetting(original: Forward, passing: dict[int, Entries]) -> Forward:
    """A stack's forward after which nothing of the pass is held."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        finally:
            passing.clear()

    return forward
