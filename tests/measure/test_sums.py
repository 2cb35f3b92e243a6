"""Sums and counts of several processes add up to those of one."""

from __future__ import annotations

from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from families import build

from billhook.anatomy import discover
from billhook.measure.ablation import Ablator, ablation
from billhook.measure.sums import Mean, Trace
from billhook.measure.trace import trace
from billhook.plan.address import Address
from billhook.plan.check import units

IDS = torch.randint(3, 90, (7, 10), generator=torch.Generator().manual_seed(3))
SHARES = (1, 6)  # windows of each process
STATISTICS = ("block", "sublayer", "angular")


def seen(ids: torch.Tensor) -> Trace:
    """Window by window: the same sums whatever the share, so that only their combination is looked at."""
    model = build("llama")
    anatomy = discover(model)
    batches = [{"input_ids": row[None]} for row in ids]
    rises = ablation(Ablator(model, anatomy, batches, "loss"), units(anatomy.outline, "block"))
    return trace(model, anatomy, batches, STATISTICS) + Trace.of_damage("loss", rises, ids.numel())


def figures(whole: Trace) -> dict[tuple[str, Any], Any]:
    angles = {("angle", i): row for i, row in enumerate(whole.angular("decoder"))}
    return {(name, unit): value for name in whole.figures for unit, value in whole.means(name).items()} | angles


def share(rank: int, place: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=len(SHARES))
    gathered: list[Any] = [None] * len(SHARES)
    dist.all_gather_object(gathered, seen(IDS.split(SHARES)[rank]))
    torch.save(reduce(add, gathered), f"{place}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs the gloo backend")
def test_two_processes_with_unequal_shares_give_what_one_gives(tmp_path: Path) -> None:
    mp.spawn(share, args=(str(tmp_path),), nprocs=len(SHARES))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(len(SHARES)))
    assert figures(first) == figures(second), "every process has the same"

    alone = seen(IDS)
    one, two = figures(first), figures(alone)
    assert one.keys() == two.keys()
    for key in one:
        assert one[key] == pytest.approx(two[key], abs=1e-12), key
    halves = [seen(ids) for ids in IDS.split(SHARES)]
    unit = Address("decoder", 2)
    naive = sum(half.means("cosine")[unit] for half in halves) / len(halves)
    assert abs(naive - alone.means("cosine")[unit]) > 1e-4, "the shares differ, so a mean of means would show"


def test_a_unit_that_only_one_share_reached_keeps_its_own_mean() -> None:
    one, other = Trace({"cosine": {Address("vision", 0): Mean(3.0, 4)}}), Trace({"cosine": {}}, work=5)
    assert (one + other).means("cosine") == {Address("vision", 0): 0.75}
    assert (one + other).work == 5
