"""The draft of self-speculation: the same weights with some units skipped, and its view of the KV cache.

The rule for keys and values: the verified cache holds what the full model computed, nothing else. The draft works on a
*fork* of it. An attention that the draft keeps reads the verified keys and values of its own slot and appends those of
the drafted tokens to the fork; an attention that it skips has none. The fork is thrown away before the verification,
which computes the drafted tokens in every block; what it then rejects is cropped. So no token of the verified prefix is
computed twice, by either of the two.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import Cache

from billhook.anatomy import Anatomy, Sublayer
from billhook.anatomy.stubs import STUBS
from billhook.plan.address import Address
from billhook.plan.check import check, normalise
from billhook.plan.errors import InputError
from billhook.plan.plan import Drop, Plan

STACK = "decoder"


class Draft:
    """What to step around in ``model``, and which cache slots the draft fills.

    ``skips``: a plan that drops units and does nothing else, or the units. Whole blocks hand the stream on; single
    sublayers are silenced by the cuts of the anatomy. Raises InputError for units that cannot be dropped, for plans
    that do more, and for models other than decoders. Nothing is changed until ``skipping``.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, skips: Plan | Iterable[Address | str]) -> None:
        self.anatomy, self.drops = anatomy, skips_of(anatomy, skips)
        self.stack = [model.get_submodule(block.path) for block in anatomy.stack(STACK).blocks]
        self._blocks = [self.stack[address.block] for address in sorted(self.drops) if address.sublayer is None]
        self._cuts = [
            (model.get_submodule(cut.path), STUBS[cut.stub]().forward)
            for address in sorted(self.drops)
            if address.sublayer is not None
            for cut in anatomy.sublayer(address).cuts
        ]
        attentions = [s for b in anatomy.stack(STACK).blocks for s in b.sublayers if s.kind == "attention"]
        kept = [s for s in attentions if not {s.address, s.address.parent} & self.drops]
        self.kept = tuple(slot(model, s) for s in kept)
        self.skipped = tuple(slot(model, s) for s in attentions if s not in kept)

    @contextmanager
    def skipping(self, shapes: dict[nn.Module, int]) -> Iterator[None]:
        """Inside, ``model`` computes the draft; leaving restores it, also by an exception. ``shapes``: what the
        function of that name found."""
        passing = [(block, _passing(shapes[block])) for block in self._blocks]
        before: list[tuple[dict[str, Any], Any]] = []
        try:
            for module, forward in (*passing, *self._cuts):
                own = vars(module)  # an attribute of the instance hides the method of its class
                before.append((own, own.get("forward")))
                own["forward"] = forward
            yield
        finally:
            for own, forward in reversed(before):
                if forward is None:
                    del own["forward"]
                else:
                    own["forward"] = forward

    def fork(self, cache: Cache, back: int = 0) -> Cache:
        """A cache that begins as ``cache`` without its last ``back`` tokens and leaves ``cache`` as it is.

        No tensor is copied: layers that grow make new tensors anyway, layers of fixed size are written behind the
        verified tokens, where the verification writes next. Masks and positions are read from the first slots, so a
        slot that the draft does not fill shows the state of a filled one, of its own kind if there is one.
        """
        twin = copy.copy(cache)
        twin.layers = [copy.copy(layer) for layer in cache.layers]
        for layer in twin.layers:
            if isinstance(getattr(layer, "cumulative_length", None), Tensor):
                layer.cumulative_length = layer.cumulative_length.clone()  # counted in place
            if back:
                layer.crop(-back)
        for index in (i for i in self.skipped if i < len(twin.layers)):
            like = (i for i in self.kept if i < len(twin.layers) and _kind(cache, i) == _kind(cache, index))
            twin.layers[index] = twin.layers[next(like, self.kept[0])]
        return twin


def skips_of(anatomy: Anatomy, skips: Plan | Iterable[Address | str]) -> frozenset[Address]:
    """The units that a draft skips, checked and in shortest form."""
    if [s.name for s in anatomy.stacks if s.causal] != [STACK] or "encoder" in {s.name for s in anatomy.stacks}:
        raise InputError(f"self-speculation needs a decoder language model; this is a {anatomy.family} model")
    plan = skips if isinstance(skips, Plan) else Plan.of(skips)
    check(plan, anatomy.outline)
    if plan.schedule is not None or any(not isinstance(edit, Drop) for edit in plan.edits):
        raise InputError(
            "a draft can only skip whole blocks and sublayers, and this plan does more; apply it, and give the result "
            "to generate as assistant_model"
        )
    drops = normalise(plan.drops, anatomy.outline)
    foreign = sorted(str(a) for a in drops if a.stack != STACK)
    if foreign:
        raise InputError(f"a draft can skip units of the {STACK} only, not {foreign[0]}")
    return drops


@contextmanager
def shapes(blocks: Iterable[nn.Module]) -> Iterator[dict[nn.Module, int]]:
    """Learns while the full model runs once what its blocks return: 0 for a tensor, else the length of the tuple."""
    found: dict[nn.Module, int] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        found[module] = len(output) if isinstance(output, tuple) else 0

    handles = [block.register_forward_hook(note) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def slot(model: nn.Module, attention: Sublayer) -> int:
    """The place in the KV cache that an attention writes to."""
    numbers = (getattr(part, "layer_idx", None) for part in model.get_submodule(attention.module).modules())
    return next(number for number in numbers if isinstance(number, int))


def _kind(cache: Cache, index: int) -> tuple[type, Any]:
    layer = cache.layers[index]
    return type(layer), getattr(layer, "sliding_window", None)


def _passing(length: int) -> Any:
    """A block's forward that hands the stream on."""
    stream = STUBS["identity"]().forward
    if not length:
        return stream
    return lambda *args, **kwargs: (stream(*args, **kwargs), *[None] * (length - 1))
