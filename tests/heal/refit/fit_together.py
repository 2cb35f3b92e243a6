"""One of several processes that refit together: ``python -m heal.refit.fit_together PLACE`` does all ``JOBS``.

Each leaves its healing, or what went wrong, in PLACE, under its name and the number of the process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from families import VOCABULARY, build
from safetensors.torch import save_file

from billhook.anatomy import discover
from billhook.data import Windows
from billhook.heal import Healing, bridge, closed_form
from billhook.heal.refit import peers, walk
from billhook.heal.refit.stepping import Batches
from billhook.plan.address import Address
from billhook.plan.errors import InputError
from billhook.plan.plan import HiddenChannels, Keep, Plan

GONE = Plan.of([Address("decoder", 1)])
NARROW = Plan.of([], keeps=[Keep(unit="decoder.2.mlp", inner="neuron", indices=tuple(range(0, 48, 2)))])


@dataclass(frozen=True)
class Job:
    """``poor``: the write before the gap does next to nothing, so that it takes what the gap offers. ``way``: how."""

    family: str
    rows: int = 40
    plan: Plan = GONE
    poor: str = ""
    way: Callable[..., Healing] = closed_form


JOBS = {
    "llama": Job("llama", poor="model.layers.0.mlp.down_proj"),
    "gpt2": Job("gpt2", poor="transformer.h.0.mlp.c_proj"),
    "t5": Job("t5"),
    "gemma2": Job("gemma2"),  # norms are refitted
    "bridge": Job("bloom_post_norm", way=bridge),
    "narrow": Job("llama_bias", plan=NARROW),
    "few": Job("llama", rows=9),  # one is held back, and the second process has none
    "channels": Job("llama", plan=Plan.of([], channels=[HiddenChannels(stack="decoder", indices=tuple(range(2, 32)))])),
}
TROUBLES = [(rank, call) for rank in (0, 1) for call in (0, 3, 8, 15)]  # whose, and at which look


def windows(rows: int) -> Windows:
    ids = torch.randint(3, VOCABULARY, (rows, 24), generator=torch.Generator().manual_seed(5))
    return Windows.of(ids, "test")


def result(job: Job) -> Healing:
    model: Any = build(job.family)
    if job.poor:
        with torch.no_grad():
            model.get_submodule(job.poor).weight.mul_(0.01)
    return job.way(model, discover(model), job.plan, windows(job.rows))


def nobody_asks(*args: Any) -> Any:
    raise AssertionError


def on_another_kind_of_device() -> None:
    """Last bits are others, and what is decided is decided by the first process."""
    folded = walk.folded
    walk.folded = lambda *args: {name: tensor * (1 + 1e-6) for name, tensor in folded(*args).items()}
    walk.choose = walk.scale_of = peers.solve = nobody_asks


def troubled(call: int, finite: Callable[..., Any]) -> Callable[..., Any]:
    """A stream is not finite the so-manieth time that one is looked at."""
    calls = iter(range(call))

    def look(*args: Any) -> Any:
        if next(calls, None) is None:
            raise InputError(f"trouble {call}")
        return finite(*args)

    return look


def main(place: Path) -> None:
    torch.set_num_threads(1)
    rank = PartialState(cpu=True).process_index
    if rank:
        on_another_kind_of_device()
    for name, job in JOBS.items():
        healing = result(job)
        save_file({key: t.contiguous() for key, t in healing.tensors.items()}, place / f"{name}-{rank}.safetensors")
        facts = {key: getattr(healing, key) for key in ("tokens", "work", "cut", "healed")}
        lists = {key: [row.model_dump() for row in getattr(healing, key)] for key in ("refits", "grafts")}
        left = dict(healing.left_alone)
        (place / f"{name}-{rank}.json").write_text(json.dumps({**facts, **lists, "left_alone": left}))
    finite, said = Batches._finite, []
    for whose, call in TROUBLES:
        if whose == rank:
            Batches._finite = troubled(call, finite)  # type: ignore[method-assign]
        try:
            result(Job("llama", rows=9))
        except InputError as error:
            said.append(str(error))
        Batches._finite = finite  # type: ignore[method-assign]
    try:
        with peers.peers_of(windows(2), build("llama")).together():
            if rank == 1:
                raise InputError("trouble at the end")
    except InputError as error:
        said.append(str(error))
    (place / f"troubles-{rank}.json").write_text(json.dumps(said))
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
