"""What dropping whole blocks could give at best."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel

from billhook.anatomy import discover
from billhook.anatomy.undo import Undo
from billhook.measure.latency import Timed
from billhook.plan.check import normalise, survivors
from billhook.plan.plan import Plan


def kept_share(dense: PreTrainedModel, plan: Plan) -> float | None:
    """Share of the decoder's blocks that a plan keeps; None where it drops single sublayers of it, or parts
    of them.

    Vision blocks do not count: they take no part in reading or writing text.
    """
    anatomy = discover(dense)
    stack = next(s for s in anatomy.stacks if s.causal)
    drops = {a for a in normalise(plan.drops, anatomy.outline) if a.stack == stack.name}
    if (
        plan.channels
        or any(a.sublayer is not None for a in drops)
        or any(unit.stack == stack.name for unit in (*(e.unit for e in plan.keeps), *(e.unit for e in plan.factors)))
    ):
        return None
    return len(survivors(drops, anatomy.outline, stack.name)) / len(stack.blocks)


def without_blocks(model: PreTrainedModel, prepare: Callable[[], Timed]) -> Callable[[], Timed]:
    """The same run with every block of the decoder gone: what is left to do outside the blocks."""
    path = next(s.path for s in discover(model).stacks if s.causal)

    def prepared() -> Timed:
        run = prepare()

        def outside() -> object:
            undo = Undo()
            try:
                undo.swap(model, path, nn.ModuleList())
                return run()
            finally:
                undo.restore()

        return outside

    return prepared
