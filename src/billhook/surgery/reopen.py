"""Loading what Billhook saved: heterogeneous checkpoints too, without running the code that comes with them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from billhook import models
from billhook.anatomy import discover
from billhook.anatomy.undo import Undo
from billhook.models.checks import read_config
from billhook.models.quiet import quiet
from billhook.plan.errors import InputError
from billhook.surgery.live import drop
from billhook.surgery.skips import PER_LAYER, declares_skips, read_skips

STOCK = "billhook_stock"  # in a config.json under a foreign model_type: the values that transformers knows


def load(
    source: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> models.Loaded:
    """As ``models.load``, and besides whatever ``export`` writes, sublayers missing included.

    The result is an instance of the stock class with stubs in the place of what is missing, exactly as ``apply`` leaves
    it. No code from the folder runs for that; ``trust_remote_code`` only matters for models that transformers does not
    have.
    """
    folder = models.locate(source, trust_remote_code)
    settings = read_config(folder)
    with stock_view(folder, settings) as view:
        if not declares_skips(read_config(view)):
            loaded = models.load(view, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        else:
            loaded = models.load(view, dtype=dtype, device=device, wrap=with_skips)
    return replace(loaded, source=os.fspath(source), folder=folder)


def skeleton(folder: Path) -> Any:
    """The model of a folder on the meta device: all of its structure, missing sublayers included, and no weights.

    ``folder`` must be in a form that transformers knows (see ``stock_view``)."""
    settings = read_config(folder)
    architecture = next(iter(settings.get("architectures") or []), None)
    stock = getattr(transformers, architecture or "", None)
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        raise InputError(
            f"{folder / 'config.json'} names the architecture {architecture}, which transformers does not have"
        )
    try:
        with quiet():
            return on_meta(stock, AutoConfig.from_pretrained(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{folder / 'config.json'} cannot be understood: {error}") from error


def on_meta(stock: type, config: Any) -> Any:
    """An instance of ``stock`` on the meta device, without the sublayers that ``config`` skips. Eval mode."""
    with torch.device("meta"):
        return with_skips(stock)(config).eval()


def with_skips(stock: type) -> type:
    """A class whose instances are those of ``stock`` with the sublayers taken out that their config skips.

    Instances become plain ``stock`` ones as soon as they are made, so that transformers treats them as its own.
    """

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)  # type: ignore[misc]
        if declares_skips(config.to_dict()):
            anatomy = discover(self)
            drop(self, anatomy, read_skips(config, anatomy), Undo())
        self.__class__ = stock

    return type(stock.__name__, (stock,), {"__init__": __init__, "__module__": stock.__module__})


@contextmanager
def stock_view(folder: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """Yield a folder with the same files and a ``config.json`` that transformers understands.

    That is ``folder`` itself unless it is in the DeciLM form, whose ``block_configs`` become ``per_layer_config``.
    """
    stock = settings.get(STOCK)
    if stock is None:
        yield folder
        return
    blocks = settings.get("block_configs")
    try:
        skips = {i: _missing(block) for i, block in enumerate(blocks)}  # type: ignore[arg-type]
        view = {key: value for key, value in settings.items() if key not in (STOCK, "block_configs", "auto_map")}
        view |= {key: stock[key] for key in ("model_type", "architectures")}
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{folder / 'config.json'} is not in the DeciLM form that Billhook writes: {error!r}"
        ) from error
    view[PER_LAYER] = {str(i): {"skip": kinds} for i, kinds in skips.items() if kinds}
    with tempfile.TemporaryDirectory() as temporary:
        for path in folder.iterdir():
            if path.name != "config.json":
                (Path(temporary) / path.name).symlink_to(path.resolve())
        (Path(temporary) / "config.json").write_text(json.dumps(view), encoding="utf-8")
        yield Path(temporary)


def _missing(block: dict[str, dict[str, Any]]) -> list[str]:
    parts = {"attention": block["attention"], "mlp": block["ffn"]}
    return [kind for kind, part in parts.items() if part.get("no_op")]
