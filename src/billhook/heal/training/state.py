"""A training that can be killed: its state in one file, replaced in one step."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from billhook.models.atomic import refusals
from billhook.plan.errors import InputError


def keep(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and facts (JSON) into one safetensors file. Whoever is killed meanwhile leaves the old one."""
    fresh = path.with_suffix(".part")
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with refusals(fresh):
        save_file(whole, fresh, metadata={"facts": json.dumps(facts)})
    with fresh.open("rb") as file:
        os.fsync(file.fileno())
    fresh.replace(path)


def kept(path: Path, of: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What ``keep`` wrote; None where there is no file. InputError for a damaged one, and for one whose facts do not
    contain ``of``: the state of something else."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise InputError(f"training state {path} is damaged; remove it to begin anew") from error
    for key, value in json.loads(json.dumps(of)).items():
        if facts.get(key) != value:
            raise InputError(
                f"training state {path} belongs to another run ({key} is {facts.get(key)!r} there and {value!r} "
                f"here); remove it to begin anew"
            )
    return tensors, facts
