"""Loading: a hub id, a folder, a GGUF file or the demo model in; a live model and its tokenizer out."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from billhook.models import adapter, checks, hub
from billhook.models.atomic import put_back
from billhook.models.demo import demo
from billhook.models.gguf import unpacked
from billhook.models.quiet import quiet
from billhook.plan.errors import InputError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
)


@dataclass(frozen=True)
class Loaded:
    """A live model in eval mode. ``tokenizer`` is None where the folder has none; ``folder`` is where the files lie
    (inside a cache for a hub id, a GGUF file or the demo). ``left_out`` names the weights in those files that the model
    has no place for and that are no part of a block (the head of another task, say): a result will not have them."""

    model: Any
    tokenizer: Any | None
    source: str
    folder: Path
    left_out: tuple[str, ...] = ()


def load(
    source: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    wrap: Callable[[type], type] | None = None,
) -> Loaded:
    """Load a model from a folder, a ``.gguf`` file, a hub id, or ``demo``.

    The class is the one that ``config.json`` names, so encoders, vision models and encoder-decoders load as
    themselves. ``dtype`` None keeps the checkpoint's own. Only safetensors and JSON are read; code that comes with a
    checkpoint runs only with ``trust_remote_code``. ``wrap`` maps the stock class to the class that is instantiated.

    Where an adapter of Billhook's own lies in the folder (``models.adapter``), its paths stand beside the linears.

    Raises InputError for anything that is not a whole, finite checkpoint: in particular no weight is ever left at its
    random initialisation, and no block of the file is ignored.
    """
    name = os.fspath(source)
    torch_dtype = _dtype(dtype)
    folder = locate(name, trust_remote_code)
    settings = checks.read_config(folder)
    checks.weight_files(folder)
    with quiet():
        cls, config = _class(settings, folder, trust_remote_code and wrap is None)
        if wrap is not None:
            cls = wrap(cls)
        model, left_out = _model(cls, config, folder, name, torch_dtype, trust_remote_code)
        tokenizer = _tokenizer(folder, trust_remote_code)
    adapter.attach(model, adapter.read(folder, model))
    checks.check_finite(model, name)
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch built without the device asserts
        raise InputError(f"device {device} cannot be used: {_first_line(error)}") from error
    return Loaded(model.eval(), tokenizer, name, folder, left_out)


def locate(source: str | os.PathLike[str], trust_remote_code: bool = False) -> Path:
    """The local folder of a model, downloaded or converted first where needed. InputError if there is none."""
    name = os.fspath(source)
    if name == "demo":
        return demo()
    path = Path(name).expanduser()
    put_back(path)
    if name and path.is_dir():
        return path
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise InputError(f"GGUF file {name} does not exist")
        return unpacked(path)
    if path.is_file():
        raise InputError(f"model {name} is a file; {hub.USAGE}")
    if not hub.plausible(name):
        raise InputError(f"model {name!r} does not exist; {hub.USAGE}")
    return hub.fetch(name, code=trust_remote_code)


def config_of(folder: Path, own_code: bool = False) -> Any:
    """The config of a folder, as transformers reads it. ValueError also for values that it refuses, on one line."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=own_code)
    except StrictDataclassError as error:  # is of no kind that anybody expects
        raise ValueError(" ".join(str(error).split())) from error
    dtype = getattr(config, "dtype", None)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype {dtype} is not a floating type")
    return config


def _class(settings: dict[str, Any], folder: Path, own_code: bool) -> tuple[Any, Any]:
    """The model class and config. ``own_code``: the folder's own classes go before those of transformers."""
    auto_map, named = settings.get("auto_map") or {}, settings.get("architectures") or [""]
    if not isinstance(auto_map, dict) or not isinstance(named, list) or not isinstance(named[0], str):
        raise InputError(f"{folder / 'config.json'}: architectures must be a list of names, auto_map an object")
    architecture = named[0]
    try:
        config = config_of(folder, own_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        if auto_map and not own_code:
            raise InputError(
                f"{folder} needs the Python code it came with ({settings.get('model_type')!r} is not part of "
                "transformers); that code runs only with trust_remote_code"
            ) from error
        raise InputError(f"{folder / 'config.json'} cannot be understood: {_first_line(error)}") from error
    auto = next((key for key in auto_map if key.startswith("AutoModel")), None)
    if own_code and auto:
        return getattr(transformers, auto), config
    stock = getattr(transformers, architecture, None)
    if isinstance(stock, type) and issubclass(stock, PreTrainedModel):
        return stock, config
    try:
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config
    except KeyError as error:
        raise InputError(
            f"{folder / 'config.json'} names the architecture {architecture}, which transformers does not have"
        ) from error


def _model(
    cls: Any, config: Any, folder: Path, name: str, dtype: Any, trust_remote_code: bool
) -> tuple[Any, tuple[str, ...]]:
    try:
        model, info = cls.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that they are named below
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, RuntimeError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{name} cannot be loaded as {cls.__name__}: {_first_line(error)}") from error
    return model, checks.check_keys(info, name, type(model))


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any | None:
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        raise InputError(f"the tokenizer in {folder} cannot be read: {_first_line(error)}") from error


def _dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    if dtype is None:
        return "auto"
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype {dtype!r} is not a floating type; use float32, bfloat16 or float16")
    return found


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
