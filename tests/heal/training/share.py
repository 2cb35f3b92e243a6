"""One of several processes that train together: ``python -m heal.training.share PLACE JOBS``, with JOBS as JSON.

Each job leaves its tensors and its record in PLACE, under its name and the number of the process."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from families import build
from heal.training.training_bed import PLAN, TOKENS, quick, text
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from billhook.anatomy import discover
from billhook.heal import UNTOUCHED
from billhook.heal.training import loop
from billhook.heal.training.train import train
from billhook.plan.plan import Plan

through = loop.Loop.through
seen: dict[str, int] = {}


def look(self: Any, subject: Any) -> Any:
    """Count what this process holds of the blocks of those that run, each weight once."""
    student = self._student
    sides = [student.model, *([student.dense] if student.goal == "dense" else [])]
    blocks = [block for side in sides for block in _blocks(side)]
    held = {id(p): p for block in blocks for p in block.parameters()}.values()
    here = [p.to_local() if isinstance(p, DTensor) else p for p in held]
    seen.update(here=sum(p.numel() for p in here), whole=sum(not isinstance(p, DTensor) for p in held))
    return through(self, subject)


def _blocks(model: Any) -> list[Any]:
    return list(max((part for part in model.modules() if isinstance(part, nn.ModuleList)), key=len))


def main(place: Path, jobs: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    loop.Loop.through = look  # type: ignore[method-assign]
    for job in jobs:
        model = build(job["family"]).to(getattr(torch, job.get("dtype", "float32")))
        plan = Plan.model_validate(job["plan"]) if "plan" in job else PLAN

        seen["steps"] = 0

        def progress(_: str, done: int, __: int, last: int = job.get("dies", 0)) -> None:
            seen["steps"] += 1
            if done == last:
                os.kill(os.getpid(), signal.SIGKILL)

        healing, record = train(
            model, discover(model), plan, UNTOUCHED, text(), quick(job["method"], **job.get("changes", {})),
            tokens=TOKENS, state=place / f"{job['name']}-state", progress=progress,
        )  # fmt: skip
        name = f"{job['name']}-{PartialState().process_index}"
        save_file({key: tensor.contiguous() for key, tensor in healing.tensors.items()}, place / f"{name}.safetensors")
        (place / f"{name}.json").write_text(json.dumps({"record": record.model_dump(mode="json"), **seen}))
    if PartialState().num_processes > 1:
        PartialState().destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
