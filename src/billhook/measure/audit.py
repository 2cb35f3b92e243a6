"""The depth audit: everything that Billhook can find out about how a stack uses its depth."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from billhook.anatomy.discover import READ_LATER
from billhook.anatomy.types import Anatomy
from billhook.data import Windows
from billhook.measure.batches import Batch
from billhook.measure.likeness import depth_maps, neighbours
from billhook.measure.outcome import Outcome
from billhook.measure.replay import Progress, Replay
from billhook.measure.skipping import skip_effects
from billhook.measure.stitching import correlation, stitches, tokenwise
from billhook.measure.sums import Trace
from billhook.measure.transition import transition
from billhook.plan.address import Address
from billhook.plan.audit import StackAudit

MOST_DEPTHS = 33
STITCHED = 7
SHARED = "blocks that read keys and values of earlier ones cannot be run on a changed stream alone"


def audit(
    model: nn.Module,
    anatomy: Anatomy,
    fit: Windows | Iterable[Batch],
    held: Windows | Iterable[Batch],
    seen: Trace,
    stack: str | None = None,
    progress: Progress | None = None,
) -> StackAudit:
    """Audit one stack. Maps are fitted on the text ``fit``; everything is judged on ``held``, which they never see.
    ``seen`` is a trace with ``block`` and ``sublayer`` statistics, for what each unit contributes.

    See ``skip_effects``, ``tokenwise``, ``stitches``, ``depth_maps``, ``neighbours`` and ``transition`` for what is
    measured and where it comes from. Maps between depths are taken at no more than 33 evenly spaced depths, stitches
    between 7. Cost in block forwards: n over both texts; about n (n - 1) for the skips and the tokenwise maps and 21 n
    for the stitches, all over ``held``. Of processor time that is, on the demo model (2,048 tokens fitted, 1,024 held,
    bfloat16, one core with AMX), 43 s for the maps between depths, 39 s for the tokenwise ones, 36 s for the skips.
    Memory: both texts' streams, (n + 1) x tokens x hidden in the model's dtype, and a few hidden^2 in float64. In a
    model whose blocks read keys and values of earlier ones, only the dense streams are looked at.
    """
    fitted, judged = Replay(model, anatomy, fit, stack, progress), Replay(model, anatomy, held, stack, progress)
    name, blocks = judged.stack.name, len(judged.stack.blocks)
    depths = _evenly(blocks + 1, MOST_DEPTHS)
    inner = tuple(i + 1 for i in _evenly(blocks, STITCHED))  # a stream can be exchanged behind a block
    runs_on = READ_LATER not in anatomy.outline.pinned.values()
    outcome = Outcome(judged)
    r2, cka = depth_maps(fitted, judged, depths, progress)
    parts = tokenwise(fitted, judged, outcome if runs_on else None, progress)
    skips = skip_effects(judged, outcome, progress) if runs_on else None
    joined = stitches(fitted, judged, outcome, inner, progress) if runs_on else None
    size, alignment = ({u: v for u, v in seen.means(s).items() if u.stack == name} for s in ("update", "alignment"))
    whole = [Address(name, i) for i in range(blocks)]
    return StackAudit(
        output=outcome.kind,
        fitted=sum(int(real.sum()) for real in fitted.real),
        held=sum(int(real.sum()) for real in judged.real),
        work=fitted.work + judged.work,
        size={str(unit): value for unit, value in size.items()},
        alignment={str(unit): value for unit, value in alignment.items()},
        transition=transition([size[u] for u in whole], [alignment[u] for u in whole]),
        depths=depths,
        r2=r2,
        cka=cka,
        neighbours=neighbours(judged, depths),
        tokenwise=parts,
        correlation=correlation(parts),
        skips=skips,
        stitches=joined,
        left_out=None if runs_on else SHARED,
    )


def _evenly(count: int, most: int) -> tuple[int, ...]:
    """At most so many of 0 ... count - 1, evenly spaced, both ends among them."""
    few = min(count, most)
    return tuple(round(i * (count - 1) / (few - 1)) for i in range(few)) if few > 1 else (0,)
