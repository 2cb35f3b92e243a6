"""Paths of low rank beside the linears of a model, kept as a PEFT adapter in a folder of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear as multiply
from transformers.pytorch_utils import Conv1D

from billhook.plan.errors import InputError

FOLDER = "adapter"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Paths = Mapping[str, tuple[Tensor, Tensor]]
"""Path of a linear in the model -> A [rank, inputs] and B [outputs, rank]: it puts out B A x besides."""

_CHILD = "beside"
_STORED = "base_model.model.{}.lora_{}.weight"


class Beside(nn.Module):
    """B A x, for the linear that it is a child of."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a, requires_grad=False)
        self.b = nn.Parameter(b, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return multiply(multiply(x, self.a), self.b)


def attach(model: nn.Module, paths: Paths) -> None:
    """Give linears a path, in place. Names of weights stay; those of the paths come in addition."""
    for name, (a, b) in paths.items():
        linear: Any = model.get_submodule(name)
        linear.add_module(_CHILD, Beside(a.to(linear.weight), b.to(linear.weight)))
        linear.register_forward_hook(_add)


def _add(linear: Any, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
    path: Tensor = getattr(linear, _CHILD)(given[0])
    return output + path


def attached(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The paths that a model has."""
    return {
        name.removesuffix(f".{_CHILD}"): (module.a.detach(), module.b.detach())
        for name, module in model.named_modules()
        if isinstance(module, Beside)
    }


@contextmanager
def without(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Inside the context the modules of a model, which cannot run there, are those that it had before it got paths;
    yields the paths."""
    found = attached(model)
    owners = [model.get_submodule(name) for name in found]
    children = [owner.get_submodule(_CHILD) for owner in owners]
    for owner in owners:
        delattr(owner, _CHILD)
    try:
        yield found
    finally:
        for owner, child in zip(owners, children, strict=True):
            owner.add_module(_CHILD, child)


def write(paths: Paths, folder: Path, model: nn.Module) -> None:
    """Those of a model as an adapter that peft reads, inside the model's folder: LoRA with an alpha that is the rank,
    so that nothing is scaled."""
    from peft import LoraConfig  # seconds, which only this needs

    ranks = {name: len(a) for name, (a, _) in paths.items()}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=list(ranks),
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in ranks),
        inference_mode=True,
    )
    config.save_pretrained(folder / FOLDER)
    tensors = {
        _STORED.format(name, side): t for name, pair in paths.items() for side, t in zip("AB", pair, strict=True)
    }
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / FOLDER / WEIGHTS, {"format": "pt"})


def require_none(folder: Path) -> None:
    """InputError where paths lie in a model folder: for what cuts a model or runs parts of it."""
    if (folder / FOLDER / CONFIG).is_file():
        raise InputError(
            f"{folder} has paths beside its linears (in {FOLDER}), with which it can only be run; give the model from "
            f"before, or merge them (merge_and_unload of peft)"
        )


def read(folder: Path, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The paths that lie in the folder of ``model``; empty where there are none. InputError for an adapter of another
    kind, and for one that does not fit."""
    place = folder / FOLDER
    if not (place / CONFIG).is_file():
        return {}
    try:
        config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(place / WEIGHTS)
        ranks = config["rank_pattern"]
        plain = config["peft_type"] == "LORA" and config["alpha_pattern"] == ranks
        names = {_STORED.format(name, side) for name in ranks for side in "AB"}
        shapes = {name: tuple(model.get_submodule(name).get_parameter("weight").shape) for name in ranks}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise InputError(f"{place} cannot be read as an adapter of this model: {error}") from error
    if not plain or names != tensors.keys():
        raise InputError(f"{place} is not an adapter that Billhook wrote; merge it into the model first")
    found = {name: (tensors[_STORED.format(name, "A")], tensors[_STORED.format(name, "B")]) for name in ranks}
    for name, (a, b) in found.items():
        if len(a) != b.shape[1] or sorted((b.shape[0], a.shape[1])) != sorted(shapes[name]):
            raise InputError(f"{place} has no path that fits {name}, whose weight is {list(shapes[name])}")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise InputError(f"{place}: the path of {name} holds NaN or Inf; the checkpoint is damaged")
    return found
