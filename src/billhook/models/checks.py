"""What must be true of a checkpoint before and after it is loaded."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from billhook.plan.errors import InputError

_INDEX = "model.safetensors.index.json"
_PER_LAYER = "per_layer_config"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def read_config(folder: Path) -> dict[str, Any]:
    """The content of ``config.json``; InputError if there is none, or it is not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"folder {folder} has no config.json; a model folder has config.json and model.safetensors")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object")
    if quantization := content.get("quantization_config"):
        method = quantization.get("quant_method", "an unknown method") if isinstance(quantization, dict) else "?"
        raise InputError(f"{folder} holds weights quantised by {method}; give the checkpoint from before quantisation")
    _check_per_layer(content, str(path), "")
    return content


def _check_per_layer(content: dict[str, Any], path: str, place: str) -> None:
    """InputError if a ``per_layer_config``, at any depth, is not of the form that transformers reads."""
    for key, value in content.items():
        if key != _PER_LAYER:
            if isinstance(value, dict):
                _check_per_layer(value, path, f"{place}{key}.")
            continue
        if value is not None and not isinstance(value, dict):
            raise InputError(f'{path}: {place}{key} must be an object such as {{"2": {{"skip": ["mlp"]}}}}')
        for number, layer in (value or {}).items():
            field = f"{place}{key}.{number}"
            if not number.isdecimal():
                raise InputError(f"{path}: {field} must have the number of a block in the place of {number!r}")
            if not isinstance(layer, dict):
                raise InputError(f'{path}: {field} must be an object such as {{"skip": ["mlp"]}}')
            skip = layer.get("skip", [])
            if not isinstance(skip, list) or not all(isinstance(kind, str) for kind in skip):
                raise InputError(f'{path}: {field}.skip must be a list of sublayers such as ["mlp"]')


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, each proven complete (headers and lengths; one open a file)."""
    single = folder / "model.safetensors"
    if single.is_file():
        files = [single]
    elif (folder / _INDEX).is_file():
        files = _shards(folder / _INDEX)
    else:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise InputError(
                f"{folder} has its weights only in {pickles[0]}, a pickle, which may execute code when read; "
                "convert it to safetensors"
            )
        raise InputError(f"folder {folder} has no model.safetensors (nor {_INDEX})")
    for path in files:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"weight file {path} is corrupt or cut short ({error}); fetch or make it again") from error
    return files


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} is not an index of weight files: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{index} names {name!r}, which is not a file beside it")
        if not (index.parent / name).is_file():
            raise InputError(f"weight file {index.parent / name} is missing; {index.name} names it")
    return [index.parent / name for name in names]


def check_keys(info: dict[str, Any], source: str, cls: type) -> tuple[str, ...]:
    """InputError if any weight of the model was not in the checkpoint, has another shape, or if a numbered part of the
    checkpoint (a block, an expert) has no place in the model. Returns what else has none: the head of another task."""
    if missing := info["missing_keys"]:
        raise InputError(f"{source} lacks weights that {cls.__name__} needs: {_some(missing)}")
    if mismatched := info["mismatched_keys"]:
        name, stored, wanted = min(mismatched)
        raise InputError(
            f"{source}: weight {name} has shape {tuple(stored)} where config.json asks for {tuple(wanted)}"
            + (f" (and {len(mismatched) - 1} more)" if len(mismatched) > 1 else "")
        )
    return left_out(info["unexpected_keys"], source, cls)


def left_out(unexpected: Collection[str], source: str, cls: type) -> tuple[str, ...]:
    """The stored weights that the model has no place for, in order: the head of another task. InputError if one belongs
    to a numbered part (a block, an expert)."""
    if numbered := {name for name in unexpected if any(part.isdecimal() for part in name.split("."))}:
        raise InputError(
            f"{source} has weights that {cls.__name__} has no place for: {_some(numbered)}; "
            "config.json must name the architecture that they belong to"
        )
    return tuple(sorted(unexpected))


def check_finite(model: nn.Module, source: str) -> None:
    """InputError naming the first parameter that holds NaN or Inf. One pass over the weights, a tensor at a time."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter.detach()).all():
            raise InputError(f"{source}: weight {name} holds NaN or Inf; the checkpoint is damaged")


def _some(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
