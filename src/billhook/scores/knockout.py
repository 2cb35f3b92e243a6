"""What the output misses without an inner unit."""

from __future__ import annotations

from torch import Tensor

from billhook.anatomy import Anatomy
from billhook.measure.knockout import By
from billhook.measure.width import WidthTrace
from billhook.plan.address import Address
from billhook.scores.registry import score


@score("knockout", needs="knockouts")
def knockout(trace: WidthTrace, anatomy: Anatomy, by: By = "interchange") -> dict[Address, Tensor]:
    """The divergence of the output from the dense model's, nats a token, when the unit is silenced (``by`` zero) or
    does what it does in another text (interchange). Figures of all sublayers compare.

    Source: head scores by ablation as in Michel et al. 2019 (arXiv 1905.10650), and by interchange as in Frank
    2026 (arXiv 2604.04385), by KV group here. Cost: one forward pass for each unit.
    """
    return dict(trace.knockouts)
