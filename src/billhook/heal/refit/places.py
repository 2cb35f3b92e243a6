"""The places of a stack, in order: what is run at once when two streams walk through it side by side."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from billhook.anatomy.types import Block, Stack, Sublayer
from billhook.plan.address import Address


@dataclass(frozen=True)
class Place:
    """A sublayer that reads what the one before it left, or a whole block: a parallel one, or one in which more than
    its sublayers acts on the stream (``mixed``: its writes do not simply add to it)."""

    number: int
    block: Block
    sublayers: tuple[Sublayer, ...]
    mixed: bool

    def kept(self, drops: Set[Address]) -> tuple[Sublayer, ...]:
        """The sublayers that a removal in shortest form leaves."""
        gone = self.block.address in drops
        return () if gone else tuple(s for s in self.sublayers if s.address not in drops)

    def acts(self, drops: Set[Address]) -> bool:
        """Whether anything of it still changes the stream."""
        return bool(self.kept(drops)) or (self.mixed and self.block.address not in drops)

    def silent(self, drops: Set[Address]) -> tuple[Sublayer, ...]:
        """What must write nothing while this place alone is run on a stream that has come this far."""
        kept = {s.address for s in self.kept(drops)}
        return tuple(s for s in self.block.sublayers if s.address not in kept)


def places(stack: Stack) -> list[Place]:
    """Every place of a stack. Running them one after the other is running the stack."""
    found: list[Place] = []
    for number, block in enumerate(stack.blocks):
        mixed = bool(block.norms) and not block.parallel
        groups = [block.sublayers] if mixed or block.parallel else [(s,) for s in block.sublayers]
        found += [Place(number, block, group, mixed) for group in groups]
    return found


def at_once(block: Block) -> Place:
    """A whole block, of any kind."""
    return Place(block.address.block, block, block.sublayers, mixed=True)
