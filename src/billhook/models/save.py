"""Saving: an ordinary folder that holds everything its source did."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from billhook.models import adapter
from billhook.models.quiet import quiet

_WEIGHTS = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".npz",
    ".pkl",
    ".tflite",
}
_COPIED = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".vocab"}
_NOTICES = ("LICENSE", "NOTICE", "USE_POLICY")
_OF_THE_SOURCE = frozenset({"billhook.json", "config.json"})  # true of the source only
_SMALL = 64 * 2**20  # bytes


def save(model: Any, tokenizer: Any | None, folder: Path, source_folder: Path | None = None) -> None:
    """Write model, tokenizer and the source's other small files (preprocessors, prompts, licence) into ``folder``.

    Weights go out as safetensors in the dtype they are in, tied ones once; paths beside linears as an adapter. The
    folder must exist: wrap the call in ``building``. The model is left as it was.
    """
    modes = {module: module.training for module in model.modules()}
    with quiet():
        with adapter.without(model) as paths:
            model.save_pretrained(folder)
        if paths:
            adapter.write(paths, folder, model)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    for module, training in modes.items():
        module.training = training
    if source_folder is not None:
        copy_extras(source_folder, folder)


def copy_extras(source: Path, folder: Path) -> None:
    """Copy the small files of a model folder that are neither weights nor already there.

    Subfolders come along where they hold no weights (the pooling settings of a sentence encoder do, a training
    checkpoint does not). Python files stay behind: the saved config does not refer to them.
    """
    _copy_files(source, folder, without=_OF_THE_SOURCE)
    for sub in sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if not any(path.suffix in _WEIGHTS for path in sub.rglob("*")):
            _copy_files(sub, folder / sub.name)


def _copy_files(source: Path, folder: Path, without: frozenset[str] = frozenset()) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and _wanted(path) and path.name not in without and not (folder / path.name).exists():
            folder.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / path.name)


def _wanted(path: Path) -> bool:
    if path.name.endswith(".index.json") or path.stat().st_size > _SMALL:
        return False
    return path.suffix in _COPIED or path.name.startswith(_NOTICES)
