"""Caches of blocks in which some tokens have no entry, and masks that fit them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from billhook.anatomy import Anatomy
from billhook.anatomy.undo import Undo
from billhook.anatomy.vocabulary import BY_ENTRY
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.runtime.kv_lending import STACK, attention_of, kinds
from billhook.runtime.online import Pass
from billhook.runtime.silence import Forward, place


class Gaps:
    """Which tokens have no entry in the caches of some ``blocks``, and their attentions, which are given masks without
    the columns of these.

    transformers makes one mask for all blocks, as wide as the first one's cache. So the first block has an entry for
    every token, and what counts positions by entries is refused: windows, caches of a fixed size. A token without an
    entry is one that later tokens do not attend to in that block; the others keep their positions.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, blocks: Iterable[Address]) -> None:
        """InputError for a model whose caches cannot have gaps, and for its first block."""
        self._model, self._blocks = model, {block.block for block in blocks}
        stacks = {stack.name: stack for stack in anatomy.stacks}
        if "encoder" in stacks or not stacks[STACK].causal:
            raise _refused("this is no decoder language model")
        self._stack, found = stacks[STACK], kinds(model, anatomy)
        widths = anatomy.outline.stack(STACK).blocks
        if any(widths[number].sublayers["attention"].window for number in found):
            raise _refused("attentions of this model have windows")
        first = min(found, default=0)
        if first in self._blocks:
            raise _refused(f"the cache of block {first} says how many tokens were read", f"leave out block {first}")
        self._gone: dict[int, list[int]] = {}
        self._now: Pass | None = None

    def fit(self, undo: Undo) -> None:
        """Put the masks' way on the model; ``undo`` takes it off."""
        for number in self._blocks:
            attention = attention_of(self._stack.blocks[number].sublayers)
            if attention is not None:
                module = self._model.get_submodule(attention.module)
                place(module, self._attending(module.forward, number, getattr(module, "layer_idx", number)), undo)

    def begin(self, now: Pass, gone: dict[int, list[int]], *, whole: bool) -> None:
        """A pass begins over a cache that has no entry for the positions ``gone`` of each block; more are added.
        InputError if it is not ``whole``: cutting it back has taken other positions from these blocks."""
        if gone and not whole:
            raise _refused("the cache was cut back", "read the whole text again")
        self._now, self._gone = now, gone

    def leave(self, block: Address) -> None:
        """The tokens of this pass get no entry in a block's cache. InputError for a cache that cannot have gaps."""
        now = self._now
        assert now is not None
        layers = getattr(now.cache, "layers", ())
        grows = layers and all(type(layer) is DynamicLayer for layer in layers)
        if not grows or getattr(now.cache, "offloading", False):  # which fetches a layer when the one before is written
            raise _refused("its cache does not simply grow", "take cache_implementation dynamic")
        self._gone.setdefault(block.block, []).extend(range(now.past, now.past + now.tokens))

    def _attending(self, original: Forward, number: int, layer: int) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            now, gone = self._now, self._gone.get(number, [])
            if now is None or now.cache is None or not now.past:
                return original(*args, **kwargs)
            if int(now.cache.get_seq_length(layer)) != now.past - len(gone):
                raise _refused("the cache has gaps that are not known", "read the whole text again")
            given = [name for name in BY_ENTRY if kwargs.get(name) is not None]  # one token alone often needs no mask
            if gone and given:
                left = torch.ones(now.past + now.tokens, dtype=torch.bool)
                left[gone] = False
                kwargs |= {name: _of(kwargs[name], left) for name in given}
            return original(*args, **kwargs)

        return forward


def _of(given: Any, left: Tensor) -> Tensor:
    """The columns of a mask or a bias that are ``left``."""
    if not isinstance(given, Tensor) or given.shape[-1] != len(left):
        raise _refused("its attention takes no mask of one column an entry")
    return given[..., left.to(given.device)]


def _refused(reason: str, remedy: str = "take writes=all") -> InputError:
    return InputError(f"policy lora-drop, writes=refresh: {reason}; {remedy}")
