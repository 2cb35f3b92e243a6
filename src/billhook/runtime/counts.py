"""What ran and what was left out, counted while the model runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from billhook.plan.address import Address
from billhook.plan.outline import Outline


@dataclass
class Counts:
    """Tokens that each sublayer worked on, and tokens for which its work was really left out; padding included.

    ``projected`` are those of the left-out tokens whose attention still made their keys and values. A token that was
    computed together with others and then not used counts as run: only what was not computed is saved.
    """

    ran: dict[Address, int] = field(default_factory=lambda: defaultdict(int))
    skipped: dict[Address, int] = field(default_factory=lambda: defaultdict(int))
    projected: dict[Address, int] = field(default_factory=lambda: defaultdict(int))
    visits: dict[Address, int] = field(default_factory=dict)
    """How often a constant schedule visits each block; empty where nothing is constant."""
    picked: dict[Address, int] = field(default_factory=lambda: defaultdict(int))
    left_out: dict[Address, int] = field(default_factory=lambda: defaultdict(int))
    """Of a mixture the experts that its router picked, of another MLP its neurons, summed over tokens; and those of
    them that were left out."""
    borrowing: frozenset[Address] = frozenset()
    """Attentions that run on keys and values of an earlier block and keep none."""

    @property
    def tables(self) -> tuple[dict[Address, int], ...]:
        """All that is counted while the model runs."""
        return (self.ran, self.skipped, self.projected, self.picked, self.left_out)

    def reset(self) -> None:
        for table in self.tables:
            table.clear()

    def share_left_out(self, unit: Address) -> float:
        """Of the experts that a mixture picked, or the neurons of an MLP, the share that was not computed."""
        return self.left_out[unit] / self.picked[unit] if self.picked[unit] else 0.0

    def share_run(self, unit: Address) -> float:
        """Executions of a sublayer a token: 1 in the plain model, 0 where it is gone, 2 where it is looped once."""
        if self.visits:
            return float(self.visits.get(unit, 0))
        total = self.ran[unit] + self.skipped[unit]
        return self.ran[unit] / total if total else 1.0

    def share_projected(self, unit: Address) -> float:
        """Tokens a token for which an attention made keys and values and nothing else."""
        total = self.ran[unit] + self.skipped[unit]
        return self.projected[unit] / total if total and not self.visits else 0.0

    def blocks_run(self, outline: Outline, stack: str = "decoder") -> float:
        """Blocks a token, a block counting by the share of its parameters that ran."""
        total = 0.0
        for address, block in outline.blocks():
            if address.stack == stack and block.params:
                parts = ((Address(stack, address.block, kind), sub.params) for kind, sub in block.sublayers.items())
                inside = sum(sub.params for sub in block.sublayers.values())
                total += sum(self.share_run(unit) * params for unit, params in parts) / inside
        return total


def constant_visits(
    units: Iterable[Address], orders: dict[str, list[int]], skips: Iterable[Address]
) -> dict[Address, int]:
    """How often a constant schedule runs each sublayer."""
    gone = set(skips)
    return {unit: 0 if unit in gone else orders[unit.stack].count(unit.block) for unit in units}
