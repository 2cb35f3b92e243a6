"""Blocks that need not go altogether: they may run on with the weights of another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from billhook.anatomy.types import Anatomy
from billhook.data import Windows
from billhook.heal import UNTOUCHED
from billhook.heal.judge import divergences
from billhook.plan.address import Address
from billhook.plan.outline import Outline
from billhook.plan.plan import Plan
from billhook.plan.schedule import Schedule
from billhook.search.path import Found

Progress = Callable[[str, int, int], None]
Leaders = Mapping[int, int]
"""Block that shares -> the block whose weights it has."""


def share(
    model: Any, anatomy: Anatomy, found: Found, windows: Windows, progress: Progress | None = None
) -> tuple[Found, Schedule | None]:
    """Of the blocks that a choice lets go, each is gone, or runs on with the weights of the nearest block that stays on
    either side, whichever leaves the model nearest to the dense one.

    All are gone at first. Those that went last, which matter most, are tried first; what brings the divergence from the
    dense model (KL, nats a token, on the calibration) down is kept. A block and all that share its weights form a
    group of neighbours, the one that the choice kept leading it. Parameters and bytes are those of the drops. A group
    saves no FLOPs, no cache and no block.

    Source: block parameter sharing of FoldGPT (arXiv 2407.00928), which shares within groups of the blocks that stay
    and fine-tunes; how groups are made is not in its abstract, and that dropping is weighed against sharing is ours.
    Cost: two passes of the model for each block and side. Gives what was found without the blocks that share, and the
    schedule that says who runs with whose weights; None where dropping was best throughout. Raises InputError for
    blocks that cannot be tied.
    """
    count = len(anatomy.stack("decoder").blocks)
    gone = {unit.block for unit in found.drops}
    order = [Address.parse(unit).block for step in found.steps for unit in step.units]
    latest = [block for block in dict.fromkeys(reversed(order)) if block in gone]
    tries = 0

    def figure(leaders: Leaders) -> float:
        nonlocal tries
        tries += 1
        return divergences(model, anatomy, _plan(gone, leaders, count), [UNTOUCHED], windows.ids)[0]

    best, leaders = figure({}), dict[int, int]()
    for number, block in enumerate(latest):
        for leader in _neighbours(block, gone, count, anatomy.outline):
            tried = {**leaders, block: leader}
            visits = _visits(gone, tried, count)
            if visits == sorted(visits) and (value := figure(tried)) < best:  # a group consists of neighbours
                best, leaders = value, tried
        if progress is not None:
            progress("sharing", number + 1, len(latest))
    drops = frozenset(unit for unit in found.drops if unit.block not in leaders)
    work = found.work + 2 * tries * windows.tokens * count
    return Found(drops, found.steps, work, found.evaluations + tries), _plan(gone, leaders, count).schedule


def _plan(gone: set[int], leaders: Leaders, count: int) -> Plan:
    plan = Plan.of(Address("decoder", block) for block in gone if block not in leaders)
    if not leaders:
        return plan
    return plan.model_copy(update={"schedule": Schedule.chain(_visits(gone, leaders, count))})


def _visits(gone: set[int], leaders: Leaders, count: int) -> list[int]:
    return [leaders.get(block, block) for block in range(count) if block not in gone or block in leaders]


def _neighbours(block: int, gone: set[int], count: int, outline: Outline) -> list[int]:
    """The nearest blocks that stay, before and behind, but for those that have to stay where they are."""
    before = next((i for i in range(block - 1, -1, -1) if i not in gone), None)
    behind = next((i for i in range(block + 1, count) if i not in gone), None)
    return [i for i in (before, behind) if i is not None and f"decoder.{i}" not in outline.pinned]
