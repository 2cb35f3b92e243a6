"""What dropping a unit alone does to the output, the more forgivable the deeper it lies."""

from __future__ import annotations

from typing import Literal

from billhook.anatomy import Anatomy
from billhook.measure.sums import Trace
from billhook.plan.address import Address
from billhook.scores.registry import Unit, of_kind, score


@score("position-weighted", needs="damage")
def position_weighted(
    trace: Trace, anatomy: Anatomy, unit: Unit = "block", of: Literal["kl", "stream"] = "kl"
) -> dict[Address, float]:
    """The damage ``of`` dropping a unit alone (kl or stream, see ``divergence``) times (n - i) / n for block i of n: of
    two units that hurt alike the deeper one goes.

    Source: HierarchicalPrune (arXiv 2508.04663), which removes late blocks and protects early ones. Neither its
    abstract nor its code has weights; these are the share of the stack that still runs. Only for damage that is never
    negative, since a weight would turn the order of negative figures round. Cost: the ablation, n(n - 1)/2 block
    forwards for n blocks.
    """
    lengths = {stack.name: len(stack.blocks) for stack in anatomy.outline.stacks}
    damage = of_kind(trace.means(of), unit)
    return {a: figure * (lengths[a.stack] - a.block) / lengths[a.stack] for a, figure in damage.items()}
