"""From a GGUF file to an ordinary folder."""

from __future__ import annotations

import contextlib
import hashlib
import io
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from billhook.models.cache import cached
from billhook.models.checks import check_keys
from billhook.models.quiet import quiet
from billhook.plan.errors import InputError

_FLOATS = {GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.F16: torch.float16}
_FORM = 1  # of the converted folder; raise it when the conversion changes


def unpacked(path: Path) -> Path:
    """The ordinary folder (config, safetensors, tokenizer) that a GGUF file converts to; kept in the cache.

    Converting takes seconds to minutes and twice the model in float32 in memory; finding it again one sha256 of the
    file. InputError if the file is no GGUF, is damaged, or of an architecture that transformers cannot read.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path} is not a GGUF file (it does not begin with GGUF)")
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return cached(f"gguf-{_FORM}-{digest[:16]}", lambda folder: convert(path, folder))


def convert(path: Path, folder: Path) -> None:
    """Write the model of a GGUF file into ``folder``, dequantised in float32, stored in its own float type where it has
    one and in bfloat16 where it is quantised."""
    # transformers draws one of its bars here whatever it is told; errors are raised, not printed
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        try:
            dtype = _stored_dtype(path)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            model, info = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError, RuntimeError, KeyError, IndexError, TypeError, ImportError) as error:
            reason = next(iter(str(error).splitlines()), "") or repr(error)
            raise InputError(f"GGUF file {path} cannot be read: {reason}") from error
        check_keys(info, str(path), type(model))
        clean = _rebuilt(model, dtype)
        clean.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _rebuilt(model: Any, dtype: torch.dtype) -> Any:
    """The same model as if it had never been quantised.

    transformers leaves ``quantization_config`` in the config of a model read from GGUF and refuses to save it. The new
    one is built without memory (meta device) and given the weights.
    """
    settings = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    config = type(model.config).from_dict(settings)
    config.dtype = dtype
    with torch.device("meta"):
        clean = type(model)(config)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    clean.load_state_dict(state, assign=True)
    clean.tie_weights()
    clean.generation_config = model.generation_config
    return clean


def _stored_dtype(path: Path) -> torch.dtype:
    """The type of the largest tensor decides; quantised weights carry no more than bfloat16 can hold."""
    largest = max(GGUFReader(path).tensors, key=lambda tensor: int(tensor.n_elements))
    return _FLOATS.get(largest.tensor_type, torch.bfloat16)
