"""An audited run: 30 blocks with a transition at the fifteenth."""

from __future__ import annotations

import math

from report.example import inspection

from billhook.plan.audit import Skips, StackAudit, Stitches, Tokenwise, Transition
from billhook.plan.record import Run

BLOCKS = 30
HALF = BLOCKS // 2


def stack_audit(**changes: object) -> StackAudit:
    size = {f"decoder.{i}.{kind}": 0.4 if i < HALF else 0.1 for i in range(BLOCKS) for kind in ("attention", "mlp")}
    later = tuple(tuple((0.6 if i < HALF else 0.2) if j > i else None for j in range(BLOCKS)) for i in range(BLOCKS))
    near = tuple(tuple(math.exp(-abs(i - j) / 20) for j in range(BLOCKS + 1)) for i in range(BLOCKS + 1))
    found = StackAudit(
        output="kl",
        fitted=2048,
        held=1024,
        work=1_500_000,
        size=size,
        alignment={unit: -0.1 if value > 0.2 else 0.1 for unit, value in size.items()},
        transition=Transition(block=HALF, found=True, step=0.9, slope=0.6, size=(0.8, 0.2), alignment=(-0.1, 0.1)),
        depths=tuple(range(BLOCKS + 1)),
        r2=near,
        cka=near,
        neighbours={1: tuple(0.5 - i / 100 for i in range(BLOCKS + 1)), 64: (0.01,) * (BLOCKS + 1)},
        tokenwise=tuple(
            Tokenwise(explained=0.9 - i / 100, cosine_tokenwise=0.95, cosine_rest=0.3, output=0.01 * (i + 1))
            for i in range(BLOCKS)
        ),
        correlation=1.0,
        skips=Skips(now=later, future=later, output_now=(0.5,) + (0.05,) * 29, output_future=(0.2,) + (0.01,) * 29),
        stitches=Stitches(depths=(1, 15, 30), output=((0.0, 0.5, 4.0), (2.0, 0.0, 0.25), (9.0, 3.0, 0.0))),
    )
    return found.model_copy(update=changes)


def audited(**changes: object) -> Run:
    return inspection().model_copy(update={"audits": {"decoder": stack_audit(**changes)}})
